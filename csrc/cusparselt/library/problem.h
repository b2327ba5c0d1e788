// One product y = x W^T with a 2:4 weight (1:2 in float32): what a plan is made for, and what its cache is keyed by.
//
//   W [batches, rows, k]    compressed; the library's A, row-major, not transposed
//   x [batches, tokens, k]  the library's B: rows of k that lie x_ld apart, or, for kTokenColumns, columns
//   y [batches, tokens, rows]  contiguous; the library's D = W x^T [rows, tokens] in column order is the same memory
//
// So nothing is transposed or copied for nn.Linear's layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../../core/dtype.h"
#include "api.h"

namespace nms::lt {

enum class XLayout : int {
  kTokenRows,     // x[t, i] at t * x_ld + i
  kTokenColumns,  // x[t, i] at i * x_ld + t
};
enum class Activation : int { kNone, kRelu, kGelu };
enum class OutType : int { kFloat32, kBFloat16, kFloat16, kInt8, kInt32, kFloat8E4M3 };

// Which kernel computes it. id < 0: the library's own choice.
struct Choice {
  int id = -1;
  int split_k = 1;
  int split_k_mode = 0;  // 0: not set

  bool operator==(const Choice&) const = default;
};

struct Problem {
  int64_t rows = 0, k = 0, tokens = 0;
  int64_t x_ld = 0;
  int64_t batches = 1;
  int64_t x_batch_stride = 0;  // elements; 0: all batches read the same x
  DType type = DType::kFloat16;
  OutType out = OutType::kFloat16;
  XLayout x_layout = XLayout::kTokenRows;
  Activation activation = Activation::kNone;
  bool scales = false;         // alpha is a device vector float32[rows] and not one number
  const void* bias = nullptr;  // device; [rows], stored as bias_type(). A plan keeps the pointer.
  Choice choice;

  bool operator==(const Problem&) const = default;
};

// Every pointer that is handed over must be a multiple of this many bytes, and so must every leading dimension.
constexpr uint32_t kAlignment = 16;

// What sizes must be multiples of.
struct Multiples {
  int64_t weight;  // rows and k
  int64_t tokens;
};
Multiples multiples_of(DType type);

int element_bytes(DType type);
int element_bytes(CudaType type);
CudaType cuda_type(DType type);
CudaType cuda_type(OutType out);
CudaType bias_type(const Problem& problem);  // float32 for int8, else y's type (float16 where y is float8)
CudaType c_type(const Problem& problem);
Compute compute_type(DType type);

// Why the library cannot take it, as far as its documentation says; empty when it can. A weight alone (compression) is
// checked with tokens = 0.
std::string why_unsupported(const Problem& problem);

// "W [4096, 11008] float16 times x [64, 11008], relu, bias, algorithm 3 with split-k 2"
std::string describe(const Problem& problem);

struct ProblemHash {
  size_t operator()(const Problem& p) const;
};

}  // namespace nms::lt
