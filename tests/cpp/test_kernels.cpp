// Every instruction set that this host has against the scalar kernels, and those against csrc/core: all element types,
// patterns, layouts and awkward sizes, bit for bit.
//
// Inputs end where their allocation ends, so that the address sanitizer sees any read too far. Outputs are compared
// with everything around them, so that any write too far shows without it.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "core/bits.h"
#include "core/dtype.h"
#include "core/packed.h"
#include "core/select.h"
#include "cpu/kernels/kernels.h"

namespace {

using nms::DType;

std::mt19937 rng(1);

int64_t random_int(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

// Memory that begins `offset` bytes behind an allocation's start and ends with it.
class Memory {
 public:
  Memory(int64_t bytes, int64_t offset) : size_(bytes + offset), offset_(offset), all_(new uint8_t[bytes + offset]) {
    std::fill(all_.get(), all_.get() + size_, uint8_t{0xA5});
  }
  Memory(const Memory& other) : Memory(other.size_ - other.offset_, other.offset_) {
    std::copy(other.all_.get(), other.all_.get() + size_, all_.get());
  }
  uint8_t* data() { return all_.get() + offset_; }
  const uint8_t* data() const { return all_.get() + offset_; }
  bool operator==(const Memory& other) const {
    return size_ == other.size_ && std::equal(all_.get(), all_.get() + size_, other.all_.get());
  }

 private:
  int64_t size_, offset_;
  std::unique_ptr<uint8_t[]> all_;
};

// ---- Inputs ----

enum class Fill { kRandom, kTies, kSpecial, kZero, kCount };

template <DType D>
typename nms::Element<D>::Bits random_element(Fill fill) {
  using Bits = typename nms::Element<D>::Bits;
  const Bits sign = random_int(0, 1) ? static_cast<Bits>(Bits{1} << (8 * sizeof(Bits) - 1)) : Bits{0};
  switch (fill) {
    case Fill::kTies:
      return static_cast<Bits>(sign | static_cast<Bits>(random_int(0, 2)) << (4 * sizeof(Bits)));
    case Fill::kZero:
      return sign;
    case Fill::kSpecial:
      if constexpr (D == DType::kInt8) {
        const Bits values[] = {0, 1, 127, 128, 129, 255};
        return values[random_int(0, 5)];
      } else {
        constexpr Bits kQuietest = static_cast<Bits>(nms::Element<D>::kNaN);  // one above infinity, where there is one
        const Bits values[] = {0,
                               1,  // the smallest denormal
                               2,
                               static_cast<Bits>(kQuietest - 1),
                               kQuietest,
                               static_cast<Bits>(kQuietest | 2),  // NaNs with payloads: all the same key
                               nms::Element<D>::kMagnitude};
        return static_cast<Bits>(values[random_int(0, 6)] | sign);
      }
    default:
      return static_cast<Bits>(rng() | uint64_t{rng()} << 32);
  }
}

struct Layout {
  const char* name;
  int64_t row_gap;  // elements between rows, or between the elements of a row where rows are interleaved
  int64_t step;     // elements from one to the next
  bool interleaved;
};

constexpr Layout kContiguous{"contiguous", 0, 1, false};
constexpr Layout kLayouts[] = {
    kContiguous,
    {"rows with a gap", 3, 1, false},
    {"interleaved", 0, 1, true},
    {"interleaved with a gap", 5, 1, true},
    {"every third", 1, 3, false},
    {"aligned rows", 0, 1, true},
};

struct Strides {
  int64_t row, k, extent;
};

Strides strides_of(const Layout& layout, int64_t rows, int64_t k) {
  Strides s;
  if (layout.interleaved) {
    s.row = layout.step;
    s.k = rows * layout.step + layout.row_gap;
  } else {
    s.k = layout.step;
    s.row = k * layout.step + layout.row_gap;
  }
  s.extent = (rows - 1) * s.row + (k - 1) * s.k + 1;
  return s;
}

template <DType D>
Memory random_memory(int64_t elements, Fill fill, int64_t offset) {
  using Bits = typename nms::Element<D>::Bits;
  Memory memory(elements * static_cast<int64_t>(sizeof(Bits)), offset);
  for (int64_t i = 0; i < elements; ++i) {
    const Bits bits = random_element<D>(fill);
    std::memcpy(memory.data() + i * sizeof(Bits), &bits, sizeof(Bits));
  }
  return memory;
}

// Offsets stay multiples of the element's size, as torch's pointers do.
int64_t random_offset(int size) { return random_int(0, 1) ? 0 : size * random_int(1, 64 / size); }

struct Shape {
  int64_t rows, k;
};

Shape random_shape(int m) {
  const int64_t around[] = {1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 500};
  constexpr int kCount = sizeof(around) / sizeof(around[0]);
  Shape shape{1, 1};
  switch (random_int(0, 3)) {
    case 0:
      shape = {around[random_int(0, 12)], around[random_int(0, kCount - 1)]};
      break;
    case 1:
      shape = {random_int(1, 40), m * random_int(1, 12)};
      break;  // whole groups
    case 2:
      shape = {random_int(1, 3), random_int(900, 2200)};
      break;  // more than a chunk
    case 3:
      shape = {random_int(1, 70), random_int(1, 2 * m + 1)};
      break;
  }
  shape.rows = std::max<int64_t>(1, std::min(shape.rows, 5000 / shape.k));
  return shape;
}

// ---- Selection ----

struct SelectCase {
  DType dtype;
  int n, m;
  Shape shape;
  Layout in, out;
  Fill fill;
  bool want_out, want_bits, in_place, stream;
};

[[noreturn]] void fail(const char* op, const char* isa, DType dtype, int n, int m, Shape shape, const Layout& in,
                       const Layout& out, Fill fill) {
  std::fprintf(stderr, "%s with %s differs: dtype %d, %d:%d, %lld x %lld, %s -> %s, fill %d\n", op, isa,
               static_cast<int>(dtype), n, m, static_cast<long long>(shape.rows), static_cast<long long>(shape.k),
               in.name, out.name, static_cast<int>(fill));
  std::exit(1);
}

// The rule, straight from core: no kernel is involved.
template <DType D>
void select_by_the_rule(const nms::SelectPanel& p) {
  using Bits = typename nms::Element<D>::Bits;
  for (int64_t r = 0; r < p.rows; ++r) {
    nms::BitWriter bits(p.bits + (p.bits ? r * p.bits_row : 0));
    for (int64_t first = 0; first < p.k; first += p.m) {
      const int len = static_cast<int>(std::min<int64_t>(p.m, p.k - first));
      typename nms::Element<D>::Key keys[nms::kMaxM];
      for (int i = 0; i < len; ++i)
        keys[i] = nms::magnitude_key<D>(static_cast<const Bits*>(p.src)[r * p.src_row + (first + i) * p.src_k]);
      const uint64_t kept = nms::select_group(keys, len, p.n);
      if (p.bits) bits.put(kept, len);
      for (int i = 0; i < len && p.dst; ++i)
        static_cast<Bits*>(p.dst)[r * p.dst_row + (first + i) * p.dst_k] =
            kept >> i & 1 ? static_cast<const Bits*>(p.src)[r * p.src_row + (first + i) * p.src_k] : Bits{0};
    }
    if (p.bits) bits.finish();
  }
}

template <DType D>
void check_select(const SelectCase& c) {
  constexpr int kSize = sizeof(typename nms::Element<D>::Bits);
  const Strides in = strides_of(c.in, c.shape.rows, c.shape.k);
  const Strides out = c.in_place ? in : strides_of(c.out, c.shape.rows, c.shape.k);
  const int64_t bits_row = (c.shape.k + 7) / 8 + (random_int(0, 2) == 0 ? 3 : 0);
  const Memory src = random_memory<D>(in.extent, c.fill, random_offset(kSize));
  const Memory dst = c.in_place ? src : Memory(out.extent * kSize, random_offset(kSize));
  const Memory bits((c.shape.rows - 1) * bits_row + (c.shape.k + 7) / 8, random_int(0, 3));

  const auto run = [&](auto select, Memory& dst_copy, Memory& bits_copy) {
    nms::SelectPanel p;
    p.src = c.in_place ? dst_copy.data() : src.data();
    p.src_row = in.row;
    p.src_k = in.k;
    p.dst = c.want_out ? dst_copy.data() : nullptr;
    p.dst_row = out.row;
    p.dst_k = out.k;
    p.bits = c.want_bits ? bits_copy.data() : nullptr;
    p.bits_row = bits_row;
    p.rows = c.shape.rows;
    p.k = c.shape.k;
    p.n = c.n;
    p.m = c.m;
    p.stream = c.stream;
    select(p);
  };
  Memory want_dst = dst, want_bits = bits;
  run(select_by_the_rule<D>, want_dst, want_bits);
  for (const char* isa : nms::cpu_isas()) {
    CHECK(nms::set_cpu_isa(isa));
    Memory got_dst = dst, got_bits = bits;
    run(nms::kernels().select[static_cast<int>(D)], got_dst, got_bits);
    if (!(got_dst == want_dst && got_bits == want_bits))
      fail("select", isa, c.dtype, c.n, c.m, c.shape, c.in, c.out, c.fill);
  }
}

// ---- Compression ----

template <DType D>
void compress_by_the_rule(const nms::CompressPanel& p) {
  using Bits = typename nms::Element<D>::Bits;
  const nms::PackedFormat format = nms::packed_format(p.n, p.m);
  for (int64_t r = 0; r < p.rows; ++r) {
    Bits* value = static_cast<Bits*>(p.values) + r * p.values_row;
    nms::BitWriter codes(p.indices + r * p.indices_row);
    for (int64_t first = 0; first < p.k; first += p.m) {
      const int len = static_cast<int>(std::min<int64_t>(p.m, p.k - first));
      Bits elements[nms::kMaxM] = {};
      typename nms::Element<D>::Key keys[nms::kMaxM];
      for (int i = 0; i < len; ++i) {
        elements[i] = static_cast<const Bits*>(p.src)[r * p.src_row + (first + i) * p.src_k];
        keys[i] = nms::magnitude_key<D>(elements[i]);
      }
      const uint64_t kept = nms::fill_short_group(nms::select_group(keys, len, p.n), len, p.n);
      for (int i = 0; i < p.m; ++i)
        if (kept >> i & 1) *value++ = elements[i];
      codes.put(nms::encode_group(kept, format), format.group_bits);
    }
    codes.finish();
  }
}

template <DType D>
void check_compress(int n, int m, Shape shape, const Layout& layout, Fill fill) {
  constexpr int kSize = sizeof(typename nms::Element<D>::Bits);
  const Strides in = strides_of(layout, shape.rows, shape.k);
  const int64_t groups = (shape.k + m - 1) / m;
  const int64_t values_row = groups * n + random_int(0, 1) * 5;
  const int64_t row_bytes = nms::index_row_bytes(nms::packed_format(n, m), groups);
  const int64_t indices_row = row_bytes + random_int(0, 1);
  const Memory src = random_memory<D>(in.extent, fill, random_offset(kSize));
  const Memory values(((shape.rows - 1) * values_row + groups * n) * kSize, random_offset(kSize));
  const Memory indices((shape.rows - 1) * indices_row + row_bytes, random_int(0, 3));
  const bool stream = random_int(0, 1) != 0;

  const auto run = [&](auto compress, Memory& values_copy, Memory& indices_copy) {
    compress(nms::CompressPanel{src.data(), in.row, in.k, values_copy.data(), values_row, indices_copy.data(),
                                indices_row, shape.rows, shape.k, n, m, stream});
  };
  Memory want_values = values, want_indices = indices;
  run(compress_by_the_rule<D>, want_values, want_indices);
  for (const char* isa : nms::cpu_isas()) {
    CHECK(nms::set_cpu_isa(isa));
    Memory got_values = values, got_indices = indices;
    run(nms::kernels().compress[static_cast<int>(D)], got_values, got_indices);
    if (!(got_values == want_values && got_indices == want_indices))
      fail("compress", isa, D, n, m, shape, layout, kContiguous, fill);
  }
}

// ---- Masks ----

template <DType D>
void check_apply(Shape shape, const Layout& from, const Layout& to, bool in_place) {
  using Bits = typename nms::Element<D>::Bits;
  constexpr int kSize = sizeof(Bits);
  const int log2_size = kSize == 1 ? 0 : kSize == 2 ? 1 : kSize == 4 ? 2 : 3;
  const Strides in = strides_of(from, shape.rows, shape.k);
  const Strides out = in_place ? in : strides_of(to, shape.rows, shape.k);
  const int64_t bits_row = (shape.k + 7) / 8 + random_int(0, 2);
  const Memory src = random_memory<D>(in.extent, Fill::kRandom, random_offset(kSize));
  const Memory dst = in_place ? src : Memory(out.extent * kSize, random_offset(kSize));
  Memory bits((shape.rows - 1) * bits_row + (shape.k + 7) / 8, random_int(0, 3));
  for (int64_t i = 0; i < (shape.rows - 1) * bits_row + (shape.k + 7) / 8; ++i)
    bits.data()[i] = static_cast<uint8_t>(rng());

  Memory want = dst;
  for (int64_t r = 0; r < shape.rows; ++r)
    for (int64_t i = 0; i < shape.k; ++i) {
      Bits value;
      std::memcpy(&value, src.data() + (r * in.row + i * in.k) * kSize, kSize);
      if (!(bits.data()[r * bits_row + i / 8] >> (i % 8) & 1)) value = 0;
      std::memcpy(want.data() + (r * out.row + i * out.k) * kSize, &value, kSize);
    }
  for (const char* isa : nms::cpu_isas()) {
    CHECK(nms::set_cpu_isa(isa));
    Memory got = dst;
    nms::kernels().apply_bits[log2_size](nms::ApplyPanel{in_place ? got.data() : src.data(), in.row, in.k, got.data(),
                                                         out.row, out.k, bits.data(), bits_row, shape.rows, shape.k});
    if (!(got == want)) fail("apply_bits", isa, D, 0, 0, shape, from, to, Fill::kRandom);
  }
}

void test_count_differing() {
  for (int64_t bytes = 0; bytes < 400; ++bytes) {
    const Memory a = random_memory<DType::kInt8>(bytes, Fill::kRandom, random_int(0, 9));
    const Memory b = random_memory<DType::kInt8>(bytes, bytes % 3 == 0 ? Fill::kZero : Fill::kRandom, random_int(0, 9));
    int64_t want = 0;
    for (int64_t i = 0; i < bytes; ++i) want += nms::popcount64(static_cast<uint64_t>(a.data()[i] ^ b.data()[i]));
    for (const char* isa : nms::cpu_isas()) {
      CHECK(nms::set_cpu_isa(isa));
      CHECK_EQ(nms::kernels().count_differing(a.data(), b.data(), bytes), want);
    }
  }
}

Fill random_fill() { return static_cast<Fill>(random_int(0, static_cast<int>(Fill::kCount) - 1)); }

Shape shape_for(const Layout& layout, int m) {
  Shape shape = random_shape(m);
  if (std::string(layout.name) == "aligned rows") shape.rows = 32 * random_int(1, 3);  // full strips only
  return shape;
}

template <DType D>
void test_dtype() {
  constexpr int kLayoutCount = sizeof(kLayouts) / sizeof(kLayouts[0]);
  for (const int m : {1, 2, 3, 4, 5, 7, 8, 12, 16, 32, 33, 64}) {
    for (int n = 1; n <= m; n += m > 32 ? 9 : 1) {  // above 32 every n takes the same loop
      for (const Layout& layout : kLayouts) {
        for (int trial = 0; trial < (m <= 4 ? 12 : m <= 16 ? 4 : 2); ++trial) {
          SelectCase c;
          c.dtype = D;
          c.n = n;
          c.m = m;
          c.shape = shape_for(layout, m);
          c.in = layout;
          c.out = random_int(0, 2) == 0 ? kLayouts[random_int(0, kLayoutCount - 1)] : layout;
          c.fill = random_fill();
          c.want_out = random_int(0, 4) != 0;
          c.want_bits = !c.want_out || random_int(0, 4) != 0;
          c.in_place = c.want_out && random_int(0, 3) == 0;
          c.stream = random_int(0, 1) != 0;
          check_select<D>(c);
        }
        check_compress<D>(n, m, shape_for(layout, m), layout, random_fill());
      }
    }
  }
  for (const Layout& from : kLayouts)
    for (const Layout& to : kLayouts)
      for (int trial = 0; trial < 10; ++trial) check_apply<D>(shape_for(from, 8), from, to, trial % 3 == 0);
}

// Rows of plausible weights, long enough for ties to meet every path of a block.
template <DType D>
void test_long_rows() {
  for (const int m : {2, 4, 8, 16, 32})
    for (int n = 1; n <= m; ++n)
      check_select<D>({D, n, m, {1, 8192}, kContiguous, kContiguous, Fill::kRandom, true, true, false, true});
}

}  // namespace

int main() {
  std::printf("instruction sets:");
  for (const char* isa : nms::cpu_isas()) std::printf(" %s", isa);
  std::printf("\n");
  test_dtype<DType::kFloat64>();
  test_dtype<DType::kFloat32>();
  test_dtype<DType::kBFloat16>();
  test_dtype<DType::kFloat16>();
  test_dtype<DType::kInt8>();
  test_dtype<DType::kFloat8E4M3>();
  test_long_rows<DType::kFloat32>();
  test_long_rows<DType::kBFloat16>();
  test_long_rows<DType::kInt8>();
  test_count_differing();
  return 0;
}
