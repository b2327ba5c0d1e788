// lt_compress and lt_matmul on CUDA: checks, padding, and one call of the engine.
#include <optional>
#include <string>

#include "../cuda/cuda_utils.h"
#include "process.h"

namespace nms {
namespace {

using lt::Activation;
using lt::OutType;
using lt::Problem;
using lt::XLayout;

// A weight [rows, k], or a batch of them.
Problem problem_of(const Tensor& t, int64_t rows, int64_t k, int64_t batches) {
  Problem problem;
  problem.rows = rows, problem.k = k, problem.batches = batches;
  problem.type = dtype_of(t, "x");
  return problem;
}

Tensor lt_compress_cuda(const Tensor& w, int64_t size) {
  NMS_CHECK((w.dim() == 2 || w.dim() == 3) && w.is_contiguous(),
            "w must be contiguous, [rows, k] or [batches, rows, k]");
  const Problem weight = problem_of(w, w.size(w.dim() - 2), w.size(w.dim() - 1), w.dim() == 3 ? w.size(0) : 1);
  const OnDevice device(w);
  lt::Engine& engine = lt::engine();
  const auto wanted = static_cast<int64_t>(engine.compressed_bytes(w.get_device_index(), weight));
  NMS_CHECK(size == wanted, "size must be what cuSPARSELt asks for, ", wanted, " bytes, got ", size);
  const Tensor blob = new_empty(w, {size}, ScalarType::Byte);
  engine.compress(w.get_device_index(), device.stream, weight, w.const_data_ptr(), blob.mutable_data_ptr());
  return blob;
}

OutType out_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return OutType::kFloat32;
    case ScalarType::BFloat16:
      return OutType::kBFloat16;
    case ScalarType::Half:
      return OutType::kFloat16;
    case ScalarType::Char:
      return OutType::kInt8;
    case ScalarType::Int:
      return OutType::kInt32;
    case ScalarType::Float8_e4m3fn:
      return OutType::kFloat8E4M3;
    default:
      NMS_CHECK(false, "out_dtype must be float32, bfloat16, float16, int8, int32 or float8_e4m3fn");
  }
}

ScalarType scalar_type(lt::CudaType type) {
  switch (type) {
    case lt::CudaType::kR16BF:
      return ScalarType::BFloat16;
    case lt::CudaType::kR16F:
      return ScalarType::Half;
    default:
      return ScalarType::Float;
  }
}

Activation activation_named(const std::string& name) {
  NMS_CHECK(name == "none" || name == "relu" || name == "gelu",
            "activation must be \"none\", \"relu\" or \"gelu\", got \"", name, "\"");
  return name == "none" ? Activation::kNone : name == "relu" ? Activation::kRelu : Activation::kGelu;
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % lt::kAlignment == 0; }

// Whether `rows` rows of x, each k long, can be read where x lies: x is aligned, and its storage goes on that far
// behind its last row. What the rows behind it hold does not matter, their results are cut off again.
bool reads_in_place(const Tensor& x, int64_t rows, int64_t k) {
  if (!is_aligned(x.const_data_ptr())) return false;
  int64_t storage = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &storage));
  const int64_t last = x.storage_offset() + (rows - 1) * x.stride(0) + k;
  return last * static_cast<int64_t>(x.element_size()) <= storage;
}

// x as the library can read it, with `tokens` rows; problem.x_* says how it lies. A copy only where it must be.
Tensor readable(const Tensor& x, Problem& p, int64_t tokens) {
  const lt::Multiples need = lt::multiples_of(p.type);
  const int64_t given = x.size(x.dim() - 2);
  const bool single = x.dim() == 2;
  const bool aligned = is_aligned(x.const_data_ptr());
  p.x_layout = XLayout::kTokenRows;
  if (single && x.stride(1) == 1 && x.stride(0) >= p.k && x.stride(0) % need.tokens == 0 &&
      reads_in_place(x, tokens, p.k)) {
    p.x_ld = x.stride(0);
    return x;
  }
  if (single && need.tokens != 16 && given == tokens && x.stride(0) == 1 && x.stride(1) >= tokens &&
      x.stride(1) % need.tokens == 0 && aligned) {
    p.x_layout = XLayout::kTokenColumns;
    p.x_ld = x.stride(1);
    return x;
  }
  p.x_ld = p.k;
  if (!single && given == tokens && x.stride(2) == 1 && x.stride(1) >= p.k && x.stride(1) % need.tokens == 0 &&
      (x.stride(0) == 0 || x.stride(0) >= tokens * x.stride(1)) && x.stride(0) % need.tokens == 0 && aligned) {
    p.x_ld = x.stride(1);
    p.x_batch_stride = x.stride(0);
    return x;
  }
  std::vector<int64_t> sizes = sizes_of(x);
  sizes[sizes.size() - 2] = tokens;
  Tensor copy = new_empty(x, sizes, x.scalar_type());
  Tensor front = torch::stable::narrow(copy, x.dim() - 2, 0, given);
  torch::stable::copy_(front, x);
  if (!single) p.x_batch_stride = tokens * p.k;
  return copy;
}

Tensor lt_matmul_cuda(const Tensor& x, const Tensor& blob, const std::optional<Tensor>& bias,
                      const std::optional<Tensor>& scales, double alpha, int64_t rows, std::string activation,
                      std::optional<ScalarType> out_dtype, int64_t algorithm, int64_t split_k, int64_t split_k_mode) {
  NMS_CHECK(x.dim() == 2 || x.dim() == 3, "x must be [tokens, k], or [batches, tokens, k] for a batch of weights");
  NMS_CHECK(blob.scalar_type() == ScalarType::Byte && blob.dim() == 1 && blob.is_contiguous(),
            "blob must be what lt_compress gives");
  check_same_device(x, blob, "x and blob");
  Problem p = problem_of(x, rows, x.size(x.dim() - 1), x.dim() == 3 ? x.size(0) : 1);
  const ScalarType out = out_dtype.value_or(x.scalar_type());
  p.out = out_type(out);
  p.activation = activation_named(activation);
  p.choice = {static_cast<int>(algorithm), static_cast<int>(split_k), static_cast<int>(split_k_mode)};
  if (bias) {
    check_same_device(x, *bias, "x and bias");
    NMS_CHECK(bias->dim() == 1 && bias->size(0) == rows && bias->is_contiguous() &&
                  bias->scalar_type() == scalar_type(lt::bias_type(p)),
              "bias must be contiguous [", rows, "], float32 for int8 weights, else of y's dtype (float16 for float8)");
    p.bias = bias->const_data_ptr();
  }
  if (scales) {
    check_same_device(x, *scales, "x and scales");
    NMS_CHECK(scales->dim() == 1 && scales->size(0) == rows && scales->is_contiguous() &&
                  scales->scalar_type() == ScalarType::Float,
              "scales must be contiguous float32 [", rows, "]");
    p.scales = true;
  }

  const int64_t given = x.size(x.dim() - 2);
  p.tokens = ceil_div(given, lt::multiples_of(p.type).tokens) * lt::multiples_of(p.type).tokens;
  std::vector<int64_t> sizes = sizes_of(x);
  sizes[sizes.size() - 2] = p.tokens, sizes[sizes.size() - 1] = rows;
  Tensor y = new_empty(x, sizes, out);
  if (y.numel() > 0) {
    const OnDevice device(x);
    const Tensor source = readable(x, p, p.tokens);
    const float factor = static_cast<float>(alpha);
    lt::engine().matmul(x.get_device_index(), device.stream, p, scales ? scales->const_data_ptr() : &factor,
                        blob.const_data_ptr(), source.const_data_ptr(), y.mutable_data_ptr());
  }
  return given == p.tokens ? y : torch::stable::narrow(y, x.dim() - 2, 0, given);
}

void copy_on(void* stream, void* to, const void* from, size_t bytes) {
  STD_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  STD_CUDA_CHECK(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status));
  return status != cudaStreamCaptureStatusNone;
}

[[maybe_unused]] const bool stream_calls_are_set = (lt::set_stream_calls({copy_on, is_capturing}), true);

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nmsparse, CUDA, m) {
  m.impl("lt_compress", TORCH_BOX(&lt_compress_cuda));
  m.impl("lt_matmul", TORCH_BOX(&lt_matmul_cuda));
}

}  // namespace nms
