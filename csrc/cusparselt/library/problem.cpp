#include "problem.h"

#include <functional>

namespace nms::lt {
namespace {

const char* name_of(DType type) {
  switch (type) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
    case DType::kInt8:
      return "int8";
    case DType::kFloat8E4M3:
      return "float8_e4m3fn";
    default:
      return "float64";
  }
}

const char* name_of(OutType out) {
  switch (out) {
    case OutType::kFloat32:
      return "float32";
    case OutType::kBFloat16:
      return "bfloat16";
    case OutType::kFloat16:
      return "float16";
    case OutType::kInt8:
      return "int8";
    case OutType::kInt32:
      return "int32";
    case OutType::kFloat8E4M3:
      return "float8_e4m3fn";
  }
  return "";
}

bool can_write(DType type, OutType out) {
  switch (type) {
    case DType::kFloat32:
      return out == OutType::kFloat32;
    case DType::kBFloat16:
      return out == OutType::kBFloat16;
    case DType::kFloat16:
      return out == OutType::kFloat16;
    case DType::kInt8:
      return out == OutType::kInt8 || out == OutType::kInt32 || out == OutType::kFloat16 || out == OutType::kBFloat16;
    case DType::kFloat8E4M3:
      return out == OutType::kFloat8E4M3 || out == OutType::kFloat16 || out == OutType::kBFloat16 ||
             out == OutType::kFloat32;
    default:
      return false;
  }
}

}  // namespace

Multiples multiples_of(DType type) {
  if (type == DType::kInt8 || type == DType::kFloat8E4M3) return {32, 16};
  return type == DType::kFloat32 ? Multiples{8, 4} : Multiples{16, 8};
}

int element_bytes(DType type) {
  if (type == DType::kInt8 || type == DType::kFloat8E4M3) return 1;
  return type == DType::kFloat32 ? 4 : type == DType::kFloat64 ? 8 : 2;
}

int element_bytes(CudaType type) {
  switch (type) {
    case CudaType::kR32F:
    case CudaType::kR32I:
      return 4;
    case CudaType::kR8I:
    case CudaType::kR8FE4M3:
      return 1;
    default:
      return 2;
  }
}

CudaType cuda_type(DType type) {
  switch (type) {
    case DType::kFloat32:
      return CudaType::kR32F;
    case DType::kBFloat16:
      return CudaType::kR16BF;
    case DType::kInt8:
      return CudaType::kR8I;
    case DType::kFloat8E4M3:
      return CudaType::kR8FE4M3;
    default:
      return CudaType::kR16F;
  }
}

CudaType cuda_type(OutType out) {
  switch (out) {
    case OutType::kFloat32:
      return CudaType::kR32F;
    case OutType::kBFloat16:
      return CudaType::kR16BF;
    case OutType::kInt8:
      return CudaType::kR8I;
    case OutType::kInt32:
      return CudaType::kR32I;
    case OutType::kFloat8E4M3:
      return CudaType::kR8FE4M3;
    default:
      return CudaType::kR16F;
  }
}

CudaType c_type(const Problem& problem) {
  return problem.out == OutType::kFloat8E4M3 ? CudaType::kR16F : cuda_type(problem.out);
}

CudaType bias_type(const Problem& problem) { return problem.type == DType::kInt8 ? CudaType::kR32F : c_type(problem); }

Compute compute_type(DType type) { return type == DType::kInt8 ? Compute::k32I : Compute::k32F; }

std::string why_unsupported(const Problem& p) {
  const std::string type = name_of(p.type);
  if (p.type == DType::kFloat64) return "float64 weights are not among what cuSPARSELt multiplies";
  const Multiples need = multiples_of(p.type);
  if (p.rows <= 0 || p.rows % need.weight != 0 || p.k <= 0 || p.k % need.weight != 0)
    return "a " + type + " weight must have sizes that are multiples of " + std::to_string(need.weight) + ", got [" +
           std::to_string(p.rows) + ", " + std::to_string(p.k) + "]";
  if (p.batches <= 0) return "batches must be at least 1, got " + std::to_string(p.batches);
  if (p.tokens == 0) return "";
  if (p.tokens < 0 || p.tokens % need.tokens != 0)
    return type + " tokens must be a multiple of " + std::to_string(need.tokens) + ", got " + std::to_string(p.tokens);
  const bool by_rows = p.x_layout == XLayout::kTokenRows;
  if (p.x_ld < (by_rows ? p.k : p.tokens) || p.x_ld % need.tokens != 0)
    return "rows of x must lie a multiple of " + std::to_string(need.tokens) + " elements apart, got " +
           std::to_string(p.x_ld);
  if (!by_rows && need.tokens == 16) return type + " x must have its last dim contiguous";
  if (!can_write(p.type, p.out)) return type + " weights cannot give " + name_of(p.out) + " results";
  if (p.activation == Activation::kGelu && (p.type != DType::kInt8 || p.out != OutType::kInt8))
    return "the library fuses gelu with int8 in and out only, got " + type + " in and " + name_of(p.out) + " out";
  if (p.scales && p.type != DType::kInt8) return "the library scales rows of int8 weights only, got " + type;
  return "";
}

std::string describe(const Problem& p) {
  const auto number = [](int64_t value) { return std::to_string(value); };
  const std::string batch = p.batches > 1 ? number(p.batches) + ", " : "";
  std::string text = "W [" + batch + number(p.rows) + ", " + number(p.k) + "] " + name_of(p.type);
  if (p.tokens == 0) return text;
  text += " times x [" + batch + number(p.tokens) + ", " + number(p.k) + "]";
  if (p.x_layout == XLayout::kTokenColumns) text += " by columns";
  text += std::string(", y ") + name_of(p.out);
  if (p.activation != Activation::kNone) text += p.activation == Activation::kRelu ? ", relu" : ", gelu";
  if (p.scales) text += ", scales";
  if (p.bias) text += ", bias";
  if (p.choice.id >= 0) text += ", algorithm " + number(p.choice.id);
  if (p.choice.split_k != 1) text += ", split-k " + number(p.choice.split_k);
  if (p.choice.split_k_mode != 0) text += " in mode " + number(p.choice.split_k_mode);
  return text;
}

size_t ProblemHash::operator()(const Problem& p) const {
  size_t hash = 0;
  const auto mix = [&hash](uint64_t value) {
    hash ^= value + 0x9e3779b97f4a7c15ull + (hash << 6) + (hash >> 2);  // as in Boost's hash_combine
  };
  mix(p.rows), mix(p.k), mix(p.tokens), mix(p.x_ld), mix(p.batches), mix(p.x_batch_stride);
  mix(static_cast<uint64_t>(p.type) | static_cast<uint64_t>(p.out) << 8 | static_cast<uint64_t>(p.x_layout) << 16 |
      static_cast<uint64_t>(p.activation) << 24 | static_cast<uint64_t>(p.scales) << 32);
  mix(reinterpret_cast<uintptr_t>(p.bias));
  mix(static_cast<uint32_t>(p.choice.id)), mix(static_cast<uint32_t>(p.choice.split_k)), mix(p.choice.split_k_mode);
  return hash;
}

}  // namespace nms::lt
