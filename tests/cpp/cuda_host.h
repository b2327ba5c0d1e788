// What the tests of the CUDA kernels share: a GPU that runs one thread after the other, and strided tensors whose
// memory ends where they end.
//
// Threads run in ascending or in descending order: a step whose result depended on the order would be a race.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/kernels/chunk.h"
#include "cuda/kernels/layout.h"
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

[[maybe_unused]] Shape random_shape(int64_t max_elements) {
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
[[maybe_unused]] Shape another_layout(const Shape& shape) {
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

template <class Fn>
void for_random_pattern(const Fn& fn) {
  const int m = static_cast<int>(random_int(0, 2) ? int64_t{1} << random_int(1, 5) : random_int(1, 64));
  fn(static_cast<int>(random_int(1, m)), m);
}

}  // namespace
