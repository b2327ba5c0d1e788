// Where the weights of a strided tensor lie, and which thread takes which of them. Torch-free, so that the host tests
// run the very index arithmetic of the kernels.
//
// Layout  A weight is rows x k: k runs along the group dim, a row is one choice of all other dims. Rows are numbered in
//         the order of those dims (the order of rows in packed outputs), but walked in the order of memory: dims are
//         sorted by stride, so that neighbouring threads touch neighbouring addresses whatever the tensor's layout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "../../core/hd.h"

namespace nms {

// Division by a number known at launch. A GPU takes about a hundred instructions for a 64-bit division, this takes
// five.
//
// With L = ceil(log2(d)) and magic = ceil(2^(63 + L) / d), n * magic / 2^(63 + L) exceeds n / d by less than
// n / 2^(63 + L) <= 1 / d * n / 2^63, too little to reach the next integer for any n < 2^63.
class Divisor {
 public:
  Divisor() : Divisor(1) {}
  explicit Divisor(int64_t value /* > 0 */) : value_(value) {
    while (shift_ < 63 && int64_t{1} << shift_ < value) ++shift_;
    const auto numerator = static_cast<unsigned __int128>(1) << (63 + shift_);
    magic_ = static_cast<uint64_t>((numerator + static_cast<uint64_t>(value) - 1) / static_cast<uint64_t>(value));
  }

  NMS_HD int64_t value() const { return value_; }

  NMS_HD int64_t quotient(int64_t n /* >= 0 */) const {
    const uint64_t twice = static_cast<uint64_t>(n) << 1;
#if defined(__CUDA_ARCH__)
    const uint64_t high = __umul64hi(twice, magic_);
#else
    const auto high = static_cast<uint64_t>(static_cast<unsigned __int128>(twice) * magic_ >> 64);
#endif
    return static_cast<int64_t>(high >> shift_);
  }

 private:
  int64_t value_;
  uint64_t magic_ = 0;
  int shift_ = 0;
};

// Of two int32 the result is int32 too, which a GPU divides much faster.
template <class A, class B>
NMS_HD auto divide_up(A a, B b) {
  return (a + b - 1) / b;
}
template <class A, class B>
NMS_HD auto round_up(A a, B b) {
  return divide_up(a, b) * b;
}

// Element offsets within the first tensor (a) and, where there is one, the second (b); and the row's number.
struct RowAt {
  int64_t a, b, row;
};

constexpr int kMaxRowDims = 4;  // weights have up to 5 dims

// The dims beside the group dim, the one with the smallest stride first. Neighbours that one stride describes are one.
struct Rows {
  int dims = 0;
  int64_t count = 1;
  Divisor size[kMaxRowDims];
  int64_t a[kMaxRowDims] = {};    // stride in the first tensor, in elements
  int64_t b[kMaxRowDims] = {};    // in the second
  int64_t row[kMaxRowDims] = {};  // in row numbers

  // The index-th row in the order of memory.
  NMS_HD RowAt at(int64_t index) const {
    RowAt found{0, 0, 0};
    for (int d = 0; d < dims; ++d) {
      const int64_t rest = d + 1 < dims ? size[d].quotient(index) : 0;
      const int64_t position = index - rest * size[d].value();
      found.a += position * a[d];
      found.b += position * b[d];
      found.row += position * row[d];
      index = rest;
    }
    return found;
  }

  // Without the first dim.
  Rows outer() const {
    Rows rest;
    for (int d = 1; d < dims; ++d) rest.append(size[d].value(), a[d], b[d], row[d]);
    return rest;
  }

  void append(int64_t new_size, int64_t new_a, int64_t new_b, int64_t new_row) {
    size[dims] = Divisor(new_size);
    a[dims] = new_a;
    b[dims] = new_b;
    row[dims] = new_row;
    count *= new_size;
    ++dims;
  }
};

// One tensor, or two of the same shape, seen as rows along the group dim.
struct Layout {
  Rows rows;
  int64_t k = 0;
  int64_t a_k = 1, b_k = 1;  // strides along k
  bool has_b = false;

  bool empty() const { return k == 0 || rows.count == 0; }
};

// `whole` elements along k must stay together: where rows lie end to end and hold a multiple of it, they become one
// row.
inline Layout make_layout(const std::vector<int64_t>& sizes, const std::vector<int64_t>& a,
                          const std::vector<int64_t>* b, int64_t dim, int64_t whole) {
  Layout layout;
  layout.k = sizes[dim];
  layout.a_k = a[dim];
  layout.b_k = b ? (*b)[dim] : a[dim];
  layout.has_b = b != nullptr;

  struct Dim {
    int64_t size, a, b, row;
  };
  std::vector<Dim> dims;  // the last one first
  int64_t row = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    if (d == dim) continue;
    if (sizes[d] != 1) {
      const Dim next{sizes[d], a[d], b ? (*b)[d] : 0, row};
      Dim* inner = dims.empty() ? nullptr : &dims.back();
      if (inner && next.a == inner->size * inner->a && (!b || next.b == inner->size * inner->b))
        inner->size *= next.size;
      else
        dims.push_back(next);
    }
    row *= sizes[d];
  }
  // Stride 0 (an expanded tensor) says nothing about neighbours: last.
  std::stable_sort(dims.begin(), dims.end(), [](const Dim& x, const Dim& y) {
    return (x.a == 0 ? INT64_MAX : x.a) < (y.a == 0 ? INT64_MAX : y.a);
  });
  for (const Dim& d : dims) layout.rows.append(d.size, d.a, d.b, d.row);

  const Rows& rows = layout.rows;
  const bool end_to_end =
      rows.dims == 1 && layout.a_k == 1 && rows.a[0] == layout.k && (!b || (layout.b_k == 1 && rows.b[0] == layout.k));
  if (end_to_end && layout.k % whole == 0) {
    layout.k *= rows.count;
    layout.rows = Rows{};
  }
  return layout;
}

// Cuts each row into spans of `span` elements, one thread each. Neighbouring threads take neighbouring rows where those
// are neighbours in memory (a strided group dim), else neighbouring spans of a row.
struct Spans {
  Layout layout;
  int64_t span = 1;
  Divisor per_row;  // spans
  Divisor lead;     // that many neighbouring threads differ in the row alone

  NMS_HD int64_t count() const { return layout.rows.count * per_row.value(); }

  struct At {
    int64_t a, b;     // element offsets of its first element
    int64_t row;      // number of its row
    int64_t index;    // of the span within the row
    int64_t first_k;  // = index * span
    int64_t len;      // elements, shorter at the end of a row
  };

  NMS_HD At at(int64_t thread) const {
    const int64_t group = lead.quotient(thread);
    const int64_t rest = per_row.quotient(group);
    const RowAt row = layout.rows.at(rest * lead.value() + (thread - group * lead.value()));
    At found;
    found.row = row.row;
    found.index = group - rest * per_row.value();
    found.first_k = found.index * span;
    found.len = layout.k - found.first_k < span ? layout.k - found.first_k : span;
    found.a = row.a + found.first_k * layout.a_k;
    found.b = row.b + found.first_k * layout.b_k;
    return found;
  }
};

inline Spans make_spans(const Layout& layout /* not empty */, int64_t span) {
  Spans spans;
  spans.layout = layout;
  spans.span = span;
  spans.per_row = Divisor(divide_up(layout.k, span));
  if (layout.a_k != 1 && layout.rows.dims > 0) spans.lead = layout.rows.size[0];
  return spans;
}

}  // namespace nms
