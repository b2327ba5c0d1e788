// The CPU kernels: plain loops over raw pointers, one set per instruction set, no torch.
//
// Kernels see a weight as a panel of rows: the group dim runs along `k`, every other dim is a row. Strides are in
// elements and arbitrary, so a channel-grouped OIHW convolution weight is read where it lies. A panel may be a part of
// a weight: the callers cut at multiples of lcm(m, 8) along k, so that groups and mask bytes stay whole.
#pragma once

#include <cstdint>
#include <vector>

#include "../../core/dtype.h"
#include "conv.h"
#include "linear.h"
#include "optim.h"
#include "linear_int8.h"
#include "linear_pack.h"
#include "matmul.h"

namespace nms {

// Choose the n largest of every m; write the masked copy, the packed mask, or both.
struct SelectPanel {
  const void* src;  // [rows, k]
  int64_t src_row, src_k;
  void* dst;  // [rows, k] or null; may be src
  int64_t dst_row, dst_k;
  uint8_t* bits;  // [rows, bits_row] bytes, of which ceil(k / 8) are written; or null
  int64_t bits_row;
  int64_t rows, k;  // k % m != 0: the last group is short
  int n, m;
  bool stream;  // write dst past the cache: it will not be read soon
};

// dst = where(bit, src, 0).
struct ApplyPanel {
  const void* src;  // [rows, k]
  int64_t src_row, src_k;
  void* dst;  // [rows, k]; may be src
  int64_t dst_row, dst_k;
  const uint8_t* bits;  // [rows, bits_row] bytes
  int64_t bits_row;
  int64_t rows, k;
};

// Choose the n largest of every m; write them side by side, and where they stood.
struct CompressPanel {
  const void* src;  // [rows, k]
  int64_t src_row, src_k;
  void* values;  // [rows, values_row], of which ceil(k / m) * n are written
  int64_t values_row;
  uint8_t* indices;  // [rows, indices_row] bytes
  int64_t indices_row;
  int64_t rows, k;
  int n, m;
  bool stream;  // write the values past the cache
};

// One row of contiguous float32. Add pruned: out = grad + factor * where(bit, 0, w); entries with a bit are copied as
// they are. Add kept: out = where(bit, grad + factor * w, 0).
struct AddPrunedRow {
  const float* grad;    // [k]
  const float* w;       // [k]
  float* out;           // [k]; may be grad
  const uint8_t* bits;  // [ceil(k / 8)]
  int64_t k;
  float factor;
  bool stream;  // write out past the cache
};

// Counts groups with fewer than n weights above the group's threshold, by their keys.
struct VotePanel {
  const void* w;  // [rows, k]; k is a multiple of m
  int64_t w_row, w_k;
  const void* thresholds;  // [rows, thresholds_row] of w's type, of which k / m are read
  int64_t thresholds_row;
  int64_t rows, k;
  int n, m;
};

using SelectFn = void (*)(const SelectPanel&);
using ApplyFn = void (*)(const ApplyPanel&);
using CompressFn = void (*)(const CompressPanel&);
using AddPrunedFn = void (*)(const AddPrunedRow&);
using VoteFn = int64_t (*)(const VotePanel&);

struct Kernels {
  const char* isa;  // "scalar", "avx2", "avx512"
  SelectFn select[kNumDTypes];
  CompressFn compress[kNumDTypes];
  ApplyFn apply_bits[4];  // by log2 of the element size: 1, 2, 4, 8 bytes
  AddPrunedFn add_pruned;
  AddPrunedFn add_kept;
  int64_t (*count_differing)(const uint8_t* a, const uint8_t* b, int64_t bytes);  // differing bits
  VoteFn vote[2];                                                                 // of float64, float32
  LinearTable linear = {};                                                        // filled by dispatch.cpp
  ConvTable conv = {};                                                            // likewise
  OptimTable optim = {};                                                          // likewise
  Int8Table int8 = {};                                                            // the same
  MatmulTable matmul = {};                                                        // the same
  PackPanelsFn pack_panels = &nms::pack_panels;                                   // the same
  UnpackPanelsFn unpack_panels = &nms::unpack_panels;                             // the same
};

// One table per instruction set; a kernel without a faster version stays the scalar one.
const Kernels& scalar_kernels();
Kernels avx2_kernels();  // x86-64 only: the scalar table with faster entries
Kernels avx512_kernels();

// The table in use: the best that the host supports, or what NMSPARSE_CPU_ISA (else ATEN_CPU_CAPABILITY) limits it to.
const Kernels& kernels();
const char* cpu_isa();
std::vector<const char*> cpu_isas();  // those that this host can run, slowest first
bool set_cpu_isa(const char* isa);    // false when this host cannot run it

// ---- Kernels that need no instruction set of their own ----

// bits[r, :] = packed mask[r, :]; a byte of the mask is true when it is not zero.
void pack_bits(const uint8_t* mask, int64_t mask_row, int64_t mask_k, uint8_t* bits, int64_t bits_row, int64_t rows,
               int64_t k);
void unpack_bits(const uint8_t* bits, int64_t bits_row, uint8_t* mask, int64_t mask_row, int64_t mask_k, int64_t rows,
                 int64_t k);

struct Violation {
  int64_t group;  // row * groups + group within the row; -1: none
  int kept;       // nonzeros found there
};
// The first group of src [rows, k] with more than n nonzeros.
Violation find_violation(DType dtype, const void* src, int64_t src_row, int64_t src_k, int64_t rows, int64_t k, int n,
                         int m);

// dense[r, :] from the packed row r; positions outside the group or past k are skipped. Element size in bytes.
void decompress(int element_size, const void* values, int64_t values_row, const uint8_t* indices, int64_t indices_row,
                void* dense, int64_t dense_row, int64_t dense_k, int64_t rows, int64_t k, int n, int m);

// The first group (row * groups + group) whose code is not legal, or whose row has bits set behind its last code.
int64_t find_bad_indices(const uint8_t* indices, int64_t indices_row, int64_t rows, int64_t groups, int n, int m);

// grad += factor * w where the bit is 0. One strided row of k elements.
void add_pruned(DType grad_dtype, void* grad, int64_t grad_k, DType w_dtype, const void* w, int64_t w_k,
                const uint8_t* bits, int64_t k, double factor);

// out = grad + factor * w, element for element. `out` and `grad` are of one type and share their strides; grad may be
// out.
struct AddPanel {
  const void* grad;  // [rows, k]
  void* out;         // [rows, k]
  int64_t out_row, out_k;
  const void* w;  // [rows, k]
  int64_t w_row, w_k;
  int64_t rows, k;
  double factor;
};
void add_scaled(DType out_dtype, DType w_dtype, const AddPanel& p);

// thresholds[r, g] = mean of the m / 2 smallest |w| of group g of row r. float64 or float32; k is a multiple of m >= 2.
void group_thresholds(DType dtype, const void* w, int64_t w_row, int64_t w_k, void* thresholds, int64_t thresholds_row,
                      int64_t rows, int64_t k, int m);

// As Kernels::apply_bits, where dst is of another dtype than src: each value is rounded to it. Both as of gradients.
void apply_bits_rounded(DType src_dtype, DType dst_dtype, const ApplyPanel& p);

// bits of the best transposable 2:4 mask; rows and cols are multiples of 4.
void select_transposable(DType dtype, const void* src, int64_t src_row, int64_t src_col, uint8_t* bits,
                         int64_t bits_row, int64_t rows, int64_t cols);

}  // namespace nms
