// The small-batch products of bfloat16.
#include "small_batch_launch.cuh"

namespace nms {

SmallPlan plan_small_bfloat16(const SmallProblem& p) { return plan_of<DType::kBFloat16>(p); }

void launch_small_bfloat16(const SmallProblem& p, const SmallPlan& plan, float* workspace, cudaStream_t stream) {
  launch_small<DType::kBFloat16>(p, plan, workspace, stream);
}

}  // namespace nms
