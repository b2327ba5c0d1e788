// epilogue, epilogue_: scales, bias and activation after a product.
#include "epilogue_arguments.h"
#include "kernels/epilogue.cuh"

namespace nms {

void launch_epilogue(const Tensor& from, const Tensor& to, const std::optional<Tensor>& scales,
                     const std::optional<Tensor>& bias, Activation activation, cudaStream_t stream) {
  const int64_t rows = from.size(from.dim() - 1);
  if (from.numel() == 0) return;
  const auto launch = [&]<DType D>() {
    using Bits = typename Element<D>::Bits;
    with_epilogue<D>(data_of<Bits>(from), mutable_data_of<Bits>(to), from.numel() / rows, rows,
                     scales ? data_of<float>(*scales) : nullptr, bias ? data_of<Bits>(*bias) : nullptr, activation,
                     [&](const auto& body) { launch_map(body, stream); });
  };
  switch (from.scalar_type()) {
    case ScalarType::Float:
      launch.template operator()<DType::kFloat32>();
      break;
    case ScalarType::BFloat16:
      launch.template operator()<DType::kBFloat16>();
      break;
    default:
      launch.template operator()<DType::kFloat16>();
      break;
  }
  check_launch();
}

namespace {

void check_epilogue(const Tensor& y, std::optional<Tensor>& scales, std::optional<Tensor>& bias) {
  const ScalarType type = y.scalar_type();
  NMS_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
            "y must be float32, bfloat16 or float16");
  NMS_CHECK(y.dim() >= 1, "y must have at least one dimension");
  check_vector(scales, "scales", y.size(y.dim() - 1), ScalarType::Float, y);
  check_vector(bias, "bias", y.size(y.dim() - 1), type, y);
}

Tensor epilogue_cuda(const Tensor& y, std::optional<Tensor> scales, std::optional<Tensor> bias,
                     std::string activation) {
  check_epilogue(y, scales, bias);
  const Activation what = activation_named(activation);
  Tensor out = new_like(y);
  const OnDevice device(y);
  if (y.is_contiguous() && out.is_contiguous()) {
    launch_epilogue(y, out, scales, bias, what, device.stream);
  } else {
    Tensor contiguous = torch::stable::clone(torch::stable::contiguous(y));
    launch_epilogue(contiguous, contiguous, scales, bias, what, device.stream);
    torch::stable::copy_(out, contiguous);
  }
  return out;
}

void epilogue_in_place_cuda(const Tensor& y, std::optional<Tensor> scales, std::optional<Tensor> bias,
                            std::string activation) {
  check_epilogue(y, scales, bias);
  check_writable(y, "y");
  const Activation what = activation_named(activation);
  const OnDevice device(y);
  if (y.is_contiguous()) return launch_epilogue(y, y, scales, bias, what, device.stream);
  Tensor contiguous = torch::stable::contiguous(y), to = y;
  launch_epilogue(contiguous, contiguous, scales, bias, what, device.stream);
  torch::stable::copy_(to, contiguous);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CUDA, m) {
  m.impl("epilogue", TORCH_BOX(&epilogue_cuda));
  m.impl("epilogue_", TORCH_BOX(&epilogue_in_place_cuda));
}

}  // namespace nms
