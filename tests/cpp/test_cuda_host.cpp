// The CUDA kernels' own index and bit arithmetic, run thread by thread on the CPU against naive loops. Whatever needs
// no GPU to go wrong goes wrong here, under the address and undefined-behaviour sanitizers: every buffer is exactly as
// large as the kernel may touch. Threads run in ascending and in descending order: a step whose result depended on the
// order would be a race.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "core/bits.h"
#include "core/convert.h"
#include "core/dtype.h"
#include "core/packed.h"
#include "core/select.h"
#include "cpu/kernels/dtype_switch.h"
#include "cuda/kernels/layout.h"
#include "cuda/kernels/select.cuh"
#include "cuda/kernels/select_fixed.h"
#include "cuda/kernels/staged.h"

namespace {

using namespace nms;

std::mt19937_64 rng(0);

int64_t random_int(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(rng); }

// ---- What the GPU does ----

template <class Body>
void run_map(const Body& body) {
  const bool forwards = random_int(0, 1);
  const int64_t count = body.count();
  for (int64_t i = 0; i < count; ++i) body(forwards ? i : count - 1 - i);
}

template <class Step>
void run_threads(const Step& step) {
  const bool forwards = random_int(0, 1);
  for (int i = 0; i < kStagedThreads; ++i) step(forwards ? i : kStagedThreads - 1 - i);
}

template <class Body>
void run_staged(const Body& body) {
  const auto shared = std::make_unique<Chunk[]>(kTileChunks);  // exact, and poisoned between tiles
  for (int64_t i = 0; i < body.count(); ++i) {
    std::memset(static_cast<void*>(shared.get()), 0xA5, kTileBytes);
    const Tile tile = tile_at(body.tiles, i);
    run_threads([&](int thread) { body.copy_in(tile, shared.get(), thread); });
    run_threads([&](int thread) { body.work(tile, shared.get(), thread); });
    if (body.writes_tile()) run_threads([&](int thread) { body.copy_out(tile, shared.get(), thread); });
  }
}

// ---- Tensors ----

// Memory that ends where the tensor ends, at a chosen offset from a 16-byte boundary.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size, int64_t offset = 0) : memory_(new Chunk[chunks(size + offset)]), size_(size) {
    // The elements stand at the end of the allocation, so that the sanitizer sees the first one behind them.
    const int64_t bytes = chunks(size + offset) * kChunkBytes;
    int64_t start = bytes - size * static_cast<int64_t>(sizeof(T));
    if (offset == 0) start = start / kChunkBytes * kChunkBytes;
    data_ = reinterpret_cast<T*>(reinterpret_cast<uint8_t*>(memory_.get()) + start);
  }
  T* data() { return data_; }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  static int64_t chunks(int64_t elements) {
    return std::max<int64_t>(1, (elements * static_cast<int64_t>(sizeof(T)) + kChunkBytes - 1) / kChunkBytes);
  }
  std::unique_ptr<Chunk[]> memory_;
  T* data_;
  int64_t size_;
};

struct Shape {
  std::vector<int64_t> sizes, strides;
  int64_t dim = 0;

  int64_t k() const { return sizes[dim]; }
  int64_t rows() const {
    int64_t rows = 1;
    for (size_t d = 0; d < sizes.size(); ++d)
      if (static_cast<int64_t>(d) != dim) rows *= sizes[d];
    return rows;
  }
  int64_t span() const {  // elements from the first to behind the last
    int64_t last = 0;
    for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
    return last + 1;
  }
  // Offset of position k of a row, from the definition.
  int64_t offset(int64_t row, int64_t k) const {
    int64_t found = k * strides[dim];
    for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
      if (d == dim) continue;
      found += row % sizes[d] * strides[d];
      row /= sizes[d];
    }
    return found;
  }
};

// Strides of a tensor that lies in memory with its dims in `order` (outermost first), each row padded by `gap`.
std::vector<int64_t> strides_in_order(const std::vector<int64_t>& sizes, const std::vector<int>& order, int64_t gap) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = order.size(); i-- > 0;) {
    strides[order[i]] = stride;
    stride *= sizes[order[i]];
    if (i + 1 == order.size()) stride += gap;
  }
  return strides;
}

Shape random_shape(int64_t max_elements) {
  const int dims = static_cast<int>(random_int(1, 5));
  Shape shape;
  int64_t left = max_elements;
  for (int d = 0; d < dims; ++d) {
    const int64_t limit = std::max<int64_t>(1, left);
    int64_t size = random_int(0, 3) == 0 ? random_int(1, limit) : random_int(1, std::min<int64_t>(limit, 40));
    if (random_int(0, 2) == 0) size = std::min<int64_t>(limit, round_up(size, 32));
    shape.sizes.push_back(size);
    left /= size;
  }
  shape.dim = random_int(0, dims - 1);
  std::vector<int> order(dims);
  std::iota(order.begin(), order.end(), 0);
  if (random_int(0, 1)) std::shuffle(order.begin(), order.end(), rng);
  shape.strides = strides_in_order(shape.sizes, order, random_int(0, 2) ? 0 : random_int(1, 16));
  return shape;
}

// Another layout for the same sizes, or the same one.
Shape another_layout(const Shape& shape) {
  Shape other = shape;
  if (random_int(0, 1)) return other;
  std::vector<int> order(shape.sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), rng);
  other.strides = strides_in_order(shape.sizes, order, random_int(0, 4));
  return other;
}

template <class Bits>
void fill_random(Buffer<Bits>& buffer) {
  const int kind = static_cast<int>(random_int(0, 2));
  for (int64_t i = 0; i < buffer.size(); ++i) {
    uint64_t bits = rng();
    if (kind == 1) bits &= 3 | uint64_t{1} << (8 * sizeof(Bits) - 1);  // many ties, both signs
    if (kind == 2 && random_int(0, 1)) bits = 0;
    buffer[i] = static_cast<Bits>(bits);
  }
}

// ---- The rule, weight by weight ----

template <DType D>
uint64_t naive_group(Buffer<BitsOf<D>>& w, const Shape& shape, int64_t row, int64_t first, int len, int n) {
  std::vector<int64_t> keys;
  for (int i = 0; i < len; ++i) keys.push_back(magnitude_key<D>(w[shape.offset(row, first + i)]));
  return select_group(keys.data(), len, n);
}

template <DType D, int M>
void check_select(const Shape& shape, const Shape& out_shape, int n, int m, bool force_strided) {
  using Bits = BitsOf<D>;
  const int64_t offset = random_int(0, 3) ? 0 : random_int(1, 15);
  Buffer<Bits> src(shape.span(), offset), dst(out_shape.span(), offset);
  fill_random(src);
  const bool with_out = random_int(0, 4) != 0, with_bits = !with_out || random_int(0, 3) != 0;
  const bool in_place = with_out && shape.strides == out_shape.strides && random_int(0, 1);
  const int64_t bits_row = divide_up(shape.k(), 8);
  Buffer<uint8_t> bits(shape.rows() * bits_row, 1);
  std::memset(bits.data(), 0xEE, bits.size());

  // Expected.
  std::vector<uint8_t> want_bits(bits.size(), 0);
  Buffer<Bits> want(out_shape.span(), 0);
  for (int64_t i = 0; i < dst.size(); ++i) want[i] = dst[i] = static_cast<Bits>(0x77);
  if (in_place)
    for (int64_t i = 0; i < src.size(); ++i) want[i] = src[i];
  for (int64_t row = 0; row < shape.rows(); ++row) {
    for (int64_t first = 0; first < shape.k(); first += m) {
      const int len = static_cast<int>(std::min<int64_t>(m, shape.k() - first));
      const uint64_t mask = naive_group<D>(src, shape, row, first, len, n);
      for (int i = 0; i < len; ++i) {
        const bool kept = mask >> i & 1;
        want[out_shape.offset(row, first + i)] = kept ? src[shape.offset(row, first + i)] : Bits{0};
        want_bits[row * bits_row + (first + i) / 8] |= static_cast<uint8_t>(kept << (first + i) % 8);
      }
    }
  }

  // The kernels.
  const Layout layout =
      make_layout(shape.sizes, shape.strides, with_out ? &out_shape.strides : nullptr, shape.dim, std::lcm(m, 8));
  Bits* out = with_out ? in_place ? src.data() : dst.data() : nullptr;
  uint8_t* mask = with_bits ? bits.data() : nullptr;
  const int64_t layout_bits_row = divide_up(layout.k, 8);
  const int unit = SelectStaged<D, M>::unit_for(m);
  const auto tiles = force_strided ? std::nullopt : make_tiles<Bits>(layout, unit, src.data(), out);
  if (tiles) {
    run_staged(SelectStaged<D, M>{*tiles, src.data(), out, mask, layout_bits_row, n, m, unit});
  } else {
    run_map(SelectStrided<D>{make_spans(layout, std::lcm(m, 8)), src.data(), out, mask, layout_bits_row, n, m});
  }
  if (with_bits)
    for (int64_t i = 0; i < bits.size(); ++i) CHECK_EQ(bits[i], want_bits[i]);
  if (with_out)
    for (int64_t i = 0; i < want.size(); ++i) CHECK_EQ((in_place ? src : dst)[i], want[i]);
}

template <class Fn>
void for_random_pattern(const Fn& fn) {
  const int m = static_cast<int>(random_int(0, 2) ? int64_t{1} << random_int(1, 5) : random_int(1, kMaxM));
  fn(static_cast<int>(random_int(1, m)), m);
}

void test_select() {
  for (int trial = 0; trial < 6000; ++trial) {
    const Shape shape = random_shape(trial % 20 == 0 ? 60000 : 3000);
    const Shape out_shape = another_layout(shape);
    const DType dtype = static_cast<DType>(random_int(0, kNumDTypes - 1));
    for_random_pattern([&](int n, int m) {
      switch_dtype(dtype, [&](auto d) {
        switch_m(m, [&](auto fixed) { check_select<d, fixed>(shape, out_shape, n, m, random_int(0, 5) == 0); });
      });
    });
  }
}

// The layouts for which the tiles were made, with every tail.
void test_select_layouts() {
  const auto check = [](const Shape& shape, int n, int m) {
    switch_m(m, [&](auto fixed) {
      check_select<DType::kFloat32, fixed>(shape, shape, n, m, false);
      check_select<DType::kBFloat16, fixed>(shape, shape, n, m, false);
      check_select<DType::kFloat8E4M3, fixed>(shape, shape, n, m, false);
    });
  };
  for (const int m : {1, 2, 4, 5, 8, 12, 16, 32, 64}) {
    const int n = std::max(1, m / 2);
    for (int64_t k = 1; k <= 130; k += k < 70 ? 1 : 17) {
      check(Shape{{3, k}, {k, 1}, 1}, n, m);                  // rows
      check(Shape{{k, 70}, {70, 1}, 0}, n, m);                // columns
      check(Shape{{2, k, 3, 3}, {9 * k, 9, 3, 1}, 1}, n, m);  // OIHW along I
    }
    check(Shape{{1, 20000}, {20000, 1}, 1}, n, m);
    check(Shape{{300, 300}, {1, 300}, 1}, n, m);
    check(Shape{{2, 1100, 3, 3}, {9900, 9, 3, 1}, 1}, n, m);
    check(Shape{{4, 64, 7, 7}, {64 * 49, 49, 7, 1}, 1}, n, m);
    check(Shape{{2, 100, 3, 3}, {900, 1, 300, 100}, 1}, n, m);  // channels_last
  }
}

// ---- Pieces ----

void test_divisor() {
  for (int trial = 0; trial < 200000; ++trial) {
    const int64_t d = trial < 3000 ? trial + 1 : static_cast<int64_t>(rng() >> random_int(1, 62)) | 1;
    const int64_t n = static_cast<int64_t>(rng() >> random_int(1, 63));
    const Divisor divisor(d);
    for (const int64_t value : {n, n / d * d, std::max<int64_t>(0, n / d * d - 1), INT64_MAX, INT64_MAX / d * d})
      CHECK_EQ(divisor.quotient(value), value / d);
  }
}

void test_slots() {
  std::vector<bool> seen(kTileChunks);
  for (int i = 0; i < kTileChunks; ++i) {
    CHECK(slot(i) / 8 == i / 8 && !seen[slot(i)]);
    seen[slot(i)] = true;
  }
  // Eight threads that read chunk j of their groups at once hit eight different banks of 16 bytes.
  for (const int group_chunks : {1, 2, 4, 8}) {
    for (int j = 0; j < group_chunks; ++j) {
      int banks = 0;
      for (int thread = 0; thread < 8; ++thread) banks |= 1 << slot(thread * group_chunks + j) % 8;
      CHECK_EQ(banks, 0xFF);
    }
  }
}

template <int M>
void test_threshold() {
  for (int trial = 0; trial < 3000; ++trial) {
    int keys[M];
    for (int& key : keys) key = static_cast<int>(random_int(0, trial % 2 ? 3 : 1000));
    for (int n = 1; n <= M; ++n) CHECK_EQ(select_by_threshold<M>(keys, n), select_group(keys, M, n));
  }
}

template <class Bits>
void test_masked() {
  constexpr int kElements = kChunkElements<Bits>;
  for (uint32_t mask = 0; mask < 1u << kElements; ++mask) {
    Chunk chunk{};
    for (int i = 0; i < kElements; ++i) set_chunk_element(&chunk, i, static_cast<Bits>(~uint64_t{0} - i));
    const Chunk out = masked<Bits>(chunk, mask | 0xFFFFFFFFu << (kElements - 1) << 1);  // higher bits do not matter
    for (int i = 0; i < kElements; ++i) {
      const Bits want = mask >> i & 1 ? static_cast<Bits>(~uint64_t{0} - i) : Bits{0};
      CHECK_EQ(chunk_element<Bits>(&out, i), want);
    }
  }
}

}  // namespace

int main() {
  test_divisor();
  test_slots();
  test_threshold<2>();
  test_threshold<4>();
  test_threshold<8>();
  test_threshold<16>();
  test_threshold<32>();
  test_masked<uint8_t>();
  test_masked<uint16_t>();
  test_masked<uint32_t>();
  test_masked<uint64_t>();
  test_select_layouts();
  test_select();
  std::puts("CUDA kernels on the host: all checks passed");
}
