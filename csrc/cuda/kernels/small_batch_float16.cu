// The small-batch products of float16.
#include "small_batch_launch.cuh"

namespace nms {

SmallPlan plan_small_float16(const SmallProblem& p) { return plan_of<DType::kFloat16>(p); }

void launch_small_float16(const SmallProblem& p, const SmallPlan& plan, float* workspace, cudaStream_t stream) {
  launch_small<DType::kFloat16>(p, plan, workspace, stream);
}

}  // namespace nms
