// How the CUDA ops meet libtorch: device, stream, launch check, and tensors as the kernels' layouts.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <vector>

#include "../torch_utils.h"
#include "kernels/layout.h"

namespace nms {

// While it lives, launches go to the tensor's device; `stream` is the caller's current one there.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) : guard_(t.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }

  cudaStream_t stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

// After every launch: a kernel that could not start must not go unnoticed.
inline void check_launch() { STD_CUDA_KERNEL_LAUNCH_CHECK(); }

// See make_layout; `b` may be null.
inline Layout layout_of(const Tensor& a, const Tensor* b, int64_t dim, int64_t whole) {
  NMS_CHECK(a.dim() <= kMaxRowDims + 1, "CUDA kernels take tensors of at most ", kMaxRowDims + 1, " dims, got ",
            a.dim());
  const std::vector<int64_t> b_strides = b ? strides_of(*b) : std::vector<int64_t>();
  return make_layout(sizes_of(a), strides_of(a), b ? &b_strides : nullptr, dim, whole);
}

template <class T>
const T* data_of(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data_of(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace nms
