// What    y = activation(x W^T * scales + bias) for few tokens, W read as it is stored: values and indices. What takes
//         the time is reading W; so it is read once, in whole 16-byte accesses, and x comes from shared memory.
// Layout  x: [tokens, k], rows x_row apart. values: [rows, groups * n], indices: [rows, index bytes]. y: [tokens,
// rows].
//         A *unit* is what a thread reads of a row at once: 16 bytes of values and their codes, 2 to 16 bytes. Other
//         patterns than the usual ones (m a power of two, n a divisor of 8) have groups as units, read element by
//         element. Neighbouring lanes take neighbouring units, so that a warp reads 512 bytes of a row's values in a
//         line, and all bytes of its codes' sectors. A thread does so for 2 or 4 rows at once.
//
//         x in shared memory, as slots of T = 1, 4 or 8 tokens (one token as float32, else as it is):
//
//            unit        0     1     2    ...  C-1  |   C    C+1  ...          128 bytes across: C = 32, 16 or 8 slots
//            input 0   [T T] [T T] [T T]  ... [T T] |
//            input 1   [T T] [T T] [T T]  ... [T T] |  the next C units lie below
//              ...
//
//         A lane only ever reads its own column, whichever of the unit's inputs an index names: lanes of one access
//         (32 of 4 bytes, 16 of 8, 8 of 16) read other banks each, so that no pattern of indices makes them wait.
//         More than 8 tokens are several tiles of them, whose blocks run side by side and find W in the second cache.
// Safety  A code can name no input outside of its unit: fields are cut to the bits of m, a power of two (an unusual
//         pattern's GroupDecoder refuses what is not below m), and inputs past k are zeros in the tile. So the codes of
//         a damaged file give a wrong result, but no access outside of the tile.
// Launch  Blocks of 16 warps: [row tiles * tiles of tokens, splits]. Steps with a barrier after each: fill x's
//         tile, add up (once per tile of x); join lanes by shuffles; join the parts that warps share, in their order.
//         Splits leave their sums in a workspace, which SumSplits adds in their order. No atomics: the same sums every
//         time.
//
// Of 2:4 in 16 bits a multiprocessor of an H200 is to read about 21 bytes a clock: 9 kept weights. Each costs three
// instructions for its place, one to read x, one to convert it, T to add, and from 4 tokens on as many more to convert
// x: 6 at one token, of 128 a clock; 13 at 4; 21 at 8, which is 6 weights a clock. Registers allow two blocks, so that
// 32 warps have 32 to 64 KiB of loads in flight; latency times bandwidth asks for about 26. These are sums on paper.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../../core/activation.h"
#include "../../core/convert.h"
#include "../../core/dtype.h"
#include "../../core/packed.h"
#include "chunk.h"
#include "launch.cuh"
#include "layout.h"
#include "small_batch_plan.h"

namespace nms {

// ---- Elements ----

// Element i of a word; i is known at compile time.
template <DType D>
NMS_HD float word_element(uint32_t word, int i) {
  if constexpr (D == DType::kInt8) {
    return static_cast<float>(static_cast<int8_t>(word >> (8 * i)));
  } else if constexpr (D == DType::kBFloat16) {
    return bit_cast<float>(i == 0 ? word << 16 : word & 0xffff0000u);
  } else {
    const auto bits = static_cast<uint16_t>(word >> (16 * i));
#if defined(__CUDA_ARCH__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return to_arithmetic<D>(bits);
#endif
  }
}

// Weights pass by once: they need not stay in the first cache. BYTES: 2, 4, 8 or 16.
template <int BYTES>
NMS_HD Chunk load_once(const void* pointer) {
  Chunk chunk{};
#if defined(__CUDA_ARCH__)
  if constexpr (BYTES == 16) {
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(chunk.word[0]), "=r"(chunk.word[1]), "=r"(chunk.word[2]), "=r"(chunk.word[3])
        : "l"(pointer));
  } else if constexpr (BYTES == 8) {
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
        : "=r"(chunk.word[0]), "=r"(chunk.word[1])
        : "l"(pointer));
  } else if constexpr (BYTES == 4) {
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(chunk.word[0]) : "l"(pointer));
  } else {
    uint16_t half;
    asm("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(half) : "l"(pointer));
    chunk.word[0] = half;
  }
#else
  memcpy(chunk.word, pointer, BYTES);
#endif
  return chunk;
}

NMS_HD void prefetch_line(const void* pointer) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(pointer));
#else
  (void)pointer;
#endif
}

// ---- Patterns ----

enum class Codes { kFields2, kFields4, kFields8, kMask };  // index fields of 2, 4, 8 bits; bitmasks with m = 2 n

// A pattern whose m is a power of two and whose n divides 8, both known at run time only: a kernel for each pattern
// would take minutes to compile and save one instruction in six. V: type of the values.
template <Codes C, DType V>
struct WideUnit {
  static constexpr bool kWide = true;
  static constexpr int kElementBytes = static_cast<int>(sizeof(typename Element<V>::Bits));
  static constexpr int kValues = kChunkBytes / kElementBytes;
  static constexpr int kBits = C == Codes::kFields8 ? 8 : C == Codes::kFields4 ? 4 : 2;  // of codes, per value
  static constexpr int kCodeBytes = kValues * kBits / 8;
  static constexpr bool kManyRegisters = C == Codes::kMask && V == DType::kInt8;

  Chunk values, codes;

  NMS_HD void load(const uint8_t* value_row, const uint8_t* code_row, int unit) {
    values = load_once<kChunkBytes>(value_row + int64_t{unit} * kChunkBytes);
    codes = load_once<kCodeBytes>(code_row + int64_t{unit} * kCodeBytes);
  }

  // fn(input of the unit, value), for every value.
  template <class Fn>
  NMS_HD void for_each(int n_log2, int m_log2, const Fn& fn) const {
    const uint32_t cut = (1u << m_log2) - 1;
    uint32_t mask = 0;  // what is left of the group's
    NMS_UNROLL
    for (int v = 0; v < kValues; ++v) {
      uint32_t place = codes.word[v * kBits / 32] >> v * kBits % 32;
      if constexpr (C == Codes::kMask) {
        if ((v & ((1 << n_log2) - 1)) == 0) mask = place & ((2u << cut) - 1);
        place = lowest_bit32(mask);  // of no bit: cut to somewhere in the group
        mask &= mask - 1;
      } else {
        place &= (1u << kBits) - 1;
      }
      const int input = (v >> n_log2 << m_log2) + static_cast<int>(place & cut);
      fn(input, word_element<V>(values.word[v * kElementBytes / 4], v % (4 / kElementBytes)));
    }
  }

 private:
  NMS_HD static uint32_t lowest_bit32(uint32_t word) {
#if defined(__CUDA_ARCH__)
    return static_cast<uint32_t>(__ffs(static_cast<int>(word)) - 1);
#else
    return word == 0 ? ~0u : static_cast<uint32_t>(__builtin_ctz(word));
#endif
  }
};

// Any pattern: a unit is a group.
template <DType V>
struct AnyUnit {
  static constexpr bool kWide = false;
  static constexpr bool kManyRegisters = false;
  static constexpr int kElementBytes = static_cast<int>(sizeof(typename Element<V>::Bits));
};

// ---- x in shared memory ----

template <DType D, int T>
struct XSlots {
  static constexpr bool kWide = T == 1;  // as float32: saves conversions while there is room
  static constexpr int kBytes = kWide ? 4 : 2 * T;
  static constexpr int kColumns = 128 / kBytes;

  // All tokens of a slot times a weight.
  NMS_HD static void add(const uint8_t* slot, float weight, float* sums /* [T] */) {
    struct [[gnu::may_alias]] alignas(kBytes) Words {
      uint32_t word[kBytes / 4];
    };
    const Words words = *reinterpret_cast<const Words*>(slot);
    NMS_UNROLL
    for (int t = 0; t < T; ++t) {
      float x;
      if constexpr (kWide)
        x = bit_cast<float>(words.word[t]);
      else
        x = word_element<D>(words.word[t / 2], t % 2);
      sums[t] = fmaf(weight, x, sums[t]);
    }
  }

  NMS_HD static void set(uint8_t* slot, int token, uint16_t bits) {
    if constexpr (kWide)
      reinterpret_cast<uint32_t*>(slot)[token] = bit_cast<uint32_t>(word_element<D>(bits, 0));
    else
      reinterpret_cast<uint16_t*>(slot)[token] = bits;
  }
};

// ---- Joining lanes ----

// The sums of N values over the `lanes` lanes of a row. Half of the values change sides at each step, as long as there
// are several, so that this takes about N shuffles instead of 5 N. Warp: exchange(v, d), the v of lane ^ d; and
// pick(d, a, b), a for lanes with bit d, else b. F: a lane's float, or in tests those of all lanes.
template <int N, class Warp, class F>
NMS_HD void join_lanes(const Warp& warp, int lanes, F* sums /* [N] */) {
  int count = N;
  NMS_UNROLL
  for (int d = 1; d < 32; d *= 2) {
    if (d >= lanes) break;
    const int half = count / 2;
    NMS_UNROLL
    for (int i = 0; i < N / 2; ++i) {
      if (i >= half) break;
      const F received = warp.exchange(warp.pick(d, sums[i], sums[i + half]), d);
      sums[i] = warp.pick(d, sums[i + half], sums[i]) + received;
    }
    if (half == 0) sums[0] = sums[0] + warp.exchange(sums[0], d);
    if (half > 0) count = half;
  }
}

// What a lane has after that: `count` values from the first-th on; `owner`: no other lane has them too.
struct Joined {
  int first, count;
  bool owner;
};

NMS_HD Joined joined_at(int n, int lanes, int lane) {
  Joined at{0, n, true};
  for (int d = 1; d < lanes; d *= 2) {
    const bool upper = lane & d;
    if (at.count > 1) {
      at.count /= 2;
      at.first += upper ? at.count : 0;
    } else {
      at.owner = at.owner && !upper;
    }
  }
  return at;
}

// ---- The product ----

struct SmallOutput {
  const float* scales;   // [rows], or null
  const uint16_t* bias;  // [rows], or null
  Activation activation;
  uint16_t* y;  // [tokens, rows]

  template <DType D>
  NMS_HD void store(int64_t token, int64_t row, int64_t rows, float sum) const {
    if (scales) sum *= scales[row];
    if (bias) sum += to_arithmetic<D>(bias[row]);
    y[token * rows + row] = from_arithmetic<D>(activate(activation, sum));
  }
};

struct SmallBlock {
  int64_t row_tile;
  int split, token_tile;
};

// What the kernels of few tokens work on, and how: all of x and W, and the part of it that is a block's.
struct SmallOperands {
  const uint16_t* x;
  int64_t x_row;
  bool x_aligned;  // 8 inputs from a multiple of 8 on are one aligned chunk
  int64_t tokens;
  Divisor token_tiles;
  const uint8_t* values;
  const uint8_t* indices;
  int64_t values_row, indices_row;  // bytes
  int64_t rows, k;
  int units;  // of a row
  SmallPlan plan;
  float* partial;  // [splits, tokens, rows], or null without splits
  SmallOutput out;

  NMS_HD int first_unit(const SmallBlock& block, int tile) const {
    return block.split * plan.split_units + tile * plan.tile_units;
  }
  // Units of a tile of x; 0 or less: there is no such tile.
  NMS_HD int tile_units(const SmallBlock& block, int tile) const {
    const int end = (block.split + 1) * plan.split_units;
    const int left = (end < units ? end : units) - first_unit(block, tile);
    return left < plan.tile_units ? left : plan.tile_units;
  }

  // A sum to where it belongs.
  template <DType D>
  NMS_HD void write(const SmallBlock& block, int64_t token, int64_t row, float sum) const {
    if (partial)
      partial[(block.split * tokens + token) * rows + row] = sum;
    else
      out.template store<D>(token, row, rows, sum);
  }
};

// D: type of x and y. T: tokens at once.
template <DType D, DType V, int T, class Unit>
struct SmallBatch : SmallOperands {
  using Slots = XSlots<D, T>;
  static constexpr int kRows = T <= 4 && !Unit::kManyRegisters ? 4 : 2;  // a thread's
  static constexpr int kSums = kRows * T;
  static constexpr int kTokens = T;
  static constexpr int kElementBytes = Unit::kElementBytes;
  static constexpr int kWarpRows = kRows, kMaxLanes = 32;  // see SmallShape

  int unit_inputs;
  int n_log2, m_log2;  // of wide units
  PackedFormat format;

  // As many as the tile of x has room for.
  int max_tile_units() const { return kSmallTileBytes / (unit_inputs * 128) * Slots::kColumns; }

  // Where a thread works.
  struct Place {
    int64_t row[kRows];  // below rows, even where `valid` says that they are not its own
    int first, step;     // units of a tile
  };

  NMS_HD Place place(const SmallBlock& block, int thread) const {
    const int warp = thread / 32, lane = thread % 32;
    Place found;
    const int64_t slot = (block.row_tile * (kSmallWarps / plan.parts) + warp / plan.parts) * (32 / plan.lanes);
    const int64_t first_row = (slot + lane / plan.lanes) * kRows;
    NMS_UNROLL
    for (int q = 0; q < kRows; ++q) found.row[q] = first_row + q < rows ? first_row + q : rows - 1;
    found.first = warp % plan.parts * plan.lanes + lane % plan.lanes;
    found.step = plan.parts * plan.lanes;
    return found;
  }

  // Has the first units brought near while the tile of x is being filled.
  NMS_HD void prefetch(const SmallBlock& block, const Place& at) const {
    if constexpr (Unit::kWide) {
      const int unit = first_unit(block, 0) + at.first;
      NMS_UNROLL
      for (int q = 0; q < kRows; ++q)
        if (unit < units) prefetch_line(values + at.row[q] * values_row + int64_t{unit} * kChunkBytes);
    }
  }

  // Step 1: x of the tile's units into shared memory.
  NMS_HD void fill(const SmallBlock& block, int tile, uint8_t* shared, int thread) const {
    constexpr int kTogether = Unit::kWide ? 8 : 1;  // inputs of one unit
    const int count = tile_units(block, tile), first = first_unit(block, tile);
    const int parts = unit_inputs / kTogether;
    const int columns = divide_up(count, Slots::kColumns) * Slots::kColumns;
    const int items = columns * T * parts;
    for (int i = thread; i < items; i += kSmallThreads) {
      // Neighbouring threads fill neighbouring columns, then tokens: other banks, or other bytes of a word.
      const int column = i % Slots::kColumns;
      int rest = i / Slots::kColumns;
      const int token = rest % T;
      rest /= T;
      const int part = rest % parts;
      const int unit = rest / parts * Slots::kColumns + column;
      if (unit >= count) continue;
      const int64_t row = int64_t{block.token_tile} * T + token;
      const int64_t from = int64_t{first + unit} * unit_inputs + part * kTogether;
      uint8_t* to = slot(shared, unit, part * kTogether);
      const uint16_t* source = x + row * x_row + from;
      if (kTogether == 8 && x_aligned && row < tokens && from + 8 <= k) {
        const Chunk chunk = load_chunk(source);
        NMS_UNROLL
        for (int j = 0; j < kTogether; ++j) Slots::set(to + j * 128, token, chunk_element<uint16_t>(&chunk, j));
      } else {
        NMS_UNROLL
        for (int j = 0; j < kTogether; ++j) {
          const bool there = row < tokens && from + j < k;
          Slots::set(to + j * 128, token, there ? source[j] : uint16_t{0});
        }
      }
    }
  }

  // Step 2: the thread's units of the tile.
  NMS_HD void add(const SmallBlock& block, int tile, const Place& at, const uint8_t* shared,
                  float* sums /* [kRows][T] */) const {
    const int count = tile_units(block, tile), first = first_unit(block, tile);
    if constexpr (Unit::kWide) {
      for (int unit = at.first; unit < count; unit += at.step) {
        Unit own[kRows];
        NMS_UNROLL
        for (int q = 0; q < kRows; ++q)
          own[q].load(values + at.row[q] * values_row, indices + at.row[q] * indices_row, first + unit);
        const uint8_t* column = slot(shared, unit, 0);
        NMS_UNROLL
        for (int q = 0; q < kRows; ++q) {
          own[q].for_each(n_log2, m_log2,
                          [&](int input, float weight) { Slots::add(column + input * 128, weight, sums + q * T); });
        }
      }
    } else {
      for (int unit = at.first; unit < count; unit += at.step) {
        const uint8_t* column = slot(shared, unit, 0);
        const int64_t group = first + unit;
        NMS_UNROLL
        for (int q = 0; q < kRows; ++q) {
          const uint8_t* codes = indices + at.row[q] * indices_row;
          GroupDecoder decoder(read_bits(codes, group * format.group_bits, format.group_bits), format);
          const uint8_t* own = values + at.row[q] * values_row + group * format.n * Unit::kElementBytes;
          NMS_KEEP_LOOP
          for (int j = 0; j < format.n; ++j) {
            const int input = decoder.next();
            if (input < 0) continue;
            uint32_t word = own[j * Unit::kElementBytes];
            if constexpr (Unit::kElementBytes == 2) word |= uint32_t{own[2 * j + 1]} << 8;
            Slots::add(column + input * 128, word_element<V>(word, 0), sums + q * T);
          }
        }
      }
    }
  }

  // Step 3, after join_lanes: a lane's joined values to where its block finds them.
  NMS_HD void publish(const float* sums, float* shared /* [warps][rows of a warp][kSums] */, int thread) const {
    const int warp = thread / 32, lane = thread % 32;
    const Joined at = joined_at(kSums, plan.lanes, lane % plan.lanes);
    if (!at.owner) return;
    float* to = shared + (warp * (32 / plan.lanes) + lane / plan.lanes) * kSums + at.first;
    NMS_UNROLL
    for (int i = 0; i < kSums; ++i)
      if (i < at.count) to[i] = sums[i];
  }

  // Step 4: the parts' sums, added and written.
  NMS_HD void finish(const SmallBlock& block, const float* shared, int thread) const {
    const int warp_rows = 32 / plan.lanes * kRows;
    const int block_rows = kSmallWarps / plan.parts * warp_rows;
    for (int i = thread; i < block_rows * T; i += kSmallThreads) {
      const int local = i % block_rows, t = i / block_rows;
      const int64_t row = block.row_tile * block_rows + local, token = int64_t{block.token_tile} * T + t;
      if (row >= rows || token >= tokens) continue;
      const int first_warp = local / warp_rows * plan.parts, in_warp = local % warp_rows;
      float sum = 0.0f;
      for (int part = 0; part < plan.parts; ++part)
        sum += shared[((first_warp + part) * (32 / plan.lanes) + in_warp / kRows) * kSums + in_warp % kRows * T + t];
      write<D>(block, token, row, sum);
    }
  }

 private:
  template <class Byte>
  NMS_HD Byte* slot(Byte* shared, int unit, int input) const {
    return shared + (unit / Slots::kColumns * unit_inputs + input) * 128 + unit % Slots::kColumns * Slots::kBytes;
  }
};

// The splits' sums, in their order; index: an element of y.
template <DType D>
struct SumSplits {
  const float* partial;  // [splits, tokens, rows]
  int splits;
  int64_t tokens;
  Divisor rows;
  SmallOutput out;

  NMS_HD int64_t count() const { return tokens * rows.value(); }

  NMS_HD void operator()(int64_t index) const {
    float sum = 0.0f;
    for (int split = 0; split < splits; ++split) sum += partial[split * count() + index];
    const int64_t token = rows.quotient(index);
    out.template store<D>(token, index - token * rows.value(), rows.value(), sum);
  }
};

#if defined(__CUDACC__)

struct DeviceWarp {
  int lane;
  __device__ float exchange(float v, int d) const { return __shfl_xor_sync(0xFFFFFFFFu, v, d); }
  __device__ float pick(int d, float a, float b) const { return lane & d ? a : b; }
};

template <class Body>
__global__ void __launch_bounds__(kSmallThreads, 2) small_batch_kernel(const __grid_constant__ Body body) {
  __shared__ Chunk memory[kSmallTileBytes / kChunkBytes];
  auto* shared = reinterpret_cast<uint8_t*>(memory);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t row_tile = body.token_tiles.quotient(blockIdx.x);
  const SmallBlock block{row_tile, static_cast<int>(blockIdx.y),
                         static_cast<int>(blockIdx.x - row_tile * body.token_tiles.value())};
  const auto at = body.place(block, thread);
  body.prefetch(block, at);
  float sums[Body::kSums] = {};
  for (int tile = 0; body.tile_units(block, tile) > 0; ++tile) {
    if (tile > 0) __syncthreads();
    body.fill(block, tile, shared, thread);
    __syncthreads();
    body.add(block, tile, at, shared, sums);
  }
  join_lanes<Body::kSums>(DeviceWarp{thread % 32}, body.plan.lanes, sums);
  __syncthreads();
  auto* joined = reinterpret_cast<float*>(memory);
  body.publish(sums, joined, thread);
  __syncthreads();
  body.finish(block, joined, thread);
}

template <DType D, DType V, int T, class Unit>
void launch_small_batch(const SmallBatch<D, V, T, Unit>& body, dim3 grid, cudaStream_t stream) {
  small_batch_kernel<<<grid, kSmallThreads, 0, stream>>>(body);
}

#endif  // defined(__CUDACC__)

}  // namespace nms
