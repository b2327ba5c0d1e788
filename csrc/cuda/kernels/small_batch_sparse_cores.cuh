// What    The product of few tokens with a 2:4 weight on sparse tensor cores, W read as it is stored: a group's two
//         values are one register of an mma.sp operand, its code is one nibble of the metadata. From 2 tokens on the
//         plain kernel (small_batch.cuh) has too much to add; here an instruction adds 8 tokens at once.
// Layout  A warp takes 16 rows and a *step* of 64 inputs (int8: 128) at a time: four lanes read 64 bytes of a row, 16
//         each, and of the row 8 below. Lane c of the four has groups G c ... G c + G - 1 of the step (G = 4, int8: 8),
//         a word each. mma.sp (m16n8k32) wants eight groups of a row, its slots; lane c brings slots c and c + 4:
//
//            slot of mma j    0      1       2        3        4        5         6          7
//            group            2j   G + 2j  2G + 2j  3G + 2j  2j + 1  G + 2j+1  2G + 2j+1  3G + 2j+1
//
//         So K is permuted and nothing is exchanged between lanes: x's tile in shared memory is written in the same
//         order, as each lane's operand of 16 bytes, and codes are picked to match. Lanes 0, 1 of the four bring the
//         metadata of even mmas (slots 0-3, slots 4-7), lanes 2, 3 that of odd ones; bits 0-15 are row r's, 16-31 row
//         r + 8's. Lane c's nibble s is nibble 4 (j / 2) + c of the G nibbles that belong to lane s.
//
//         x in shared memory: [steps][8 tokens each][mmas of a step][token n][lane c of four][4 words]: a warp's
//         operand of an mma is 512 bytes in a line. Word i of lane c: slot 2 i + c / 2, its inputs 2 (c % 2) and the
//         next.
// Safety  Nothing is addressed by a code, so that damaged ones can make nothing be read. (PTX leaves open what comes of
//         nibbles without idx0 < idx1; files that have them are refused when they are read.)
// Launch  As small_batch.cuh: [row tiles * tiles of tokens, splits], 16 warps, of which `parts` share rows; a warp's
//         sums go to shared memory and are added in the order of parts. No atomics. Registers allow two blocks a
//         multiprocessor. A warp has 1 KiB of W in flight, 2 for up to 8 tokens, 32 of them 32 or 64 KiB.
#pragma once

#include "small_batch.cuh"

namespace nms {

// D = D + A B of one warp, see above. Defined on the device; tests compute the same for 32 lanes.
struct SparseOperand {
  uint32_t a[4];
  uint32_t metadata;
};

template <DType D>
NMS_HD uint32_t pack_halves(float low, float high) {
#if defined(__CUDA_ARCH__)
  uint32_t both;
  if constexpr (D == DType::kFloat16)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  return from_arithmetic<D>(low) | uint32_t{from_arithmetic<D>(high)} << 16;
#endif
}

// D: type of x and y. V: of the values. NT: tiles of 8 tokens.
template <DType D, DType V, int NT>
struct SparseCoreBatch : SmallOperands {
  static constexpr DType kType = D;
  static constexpr int kTokens = 8 * NT;
  static constexpr int kGroups = V == DType::kInt8 ? 8 : 4;  // of a lane
  static constexpr int kMmas = kGroups / 2;
  static constexpr int kStep = 16 * kGroups;              // inputs
  static constexpr int kStepBytes = kTokens * kStep * 2;  // of x
  static constexpr int kElementBytes = V == DType::kInt8 ? 1 : 2;
  static constexpr int kWarpRows = 16, kMaxLanes = 1;  // see SmallShape
  static constexpr int kSums = 4 * NT;
  static constexpr int kUnroll = NT == 1 ? 2 : 1;  // steps whose loads are under way together; registers allow no more
  static_assert(kSmallWarps * kWarpRows * kTokens * 4 <= kSmallTileBytes);

  // As many as the tile of x has room for.
  int max_tile_units() const { return kSmallTileBytes / kStepBytes; }

  // What a lane reads of a step: rows r and r + 8.
  struct Read {
    Chunk values[2];
    uint32_t codes[2][kGroups / 2];  // all four lanes' nibbles, kGroups of them each
  };

  struct Place {
    int64_t row[2];  // below rows, even where they are not its own
  };

  NMS_HD Place place(const SmallBlock& block, int thread) const {
    const int warp = thread / 32, lane = thread % 32;
    const int64_t first = (block.row_tile * (kSmallWarps / plan.parts) + warp / plan.parts) * kWarpRows + lane / 4;
    return {{first < rows ? first : rows - 1, first + 8 < rows ? first + 8 : rows - 1}};
  }

  NMS_HD void prefetch(const SmallBlock& block, const Place& at, int thread) const {
    const int unit = first_unit(block, 0) + thread / 32 % plan.parts;
    if (unit >= units || thread % 4 != 0) return;
    prefetch_line(values + at.row[0] * values_row + int64_t{unit} * 64);
    prefetch_line(values + at.row[1] * values_row + int64_t{unit} * 64);
  }

  // Step 1: x of the tile's steps into shared memory, in the order of the operands.
  NMS_HD void fill(const SmallBlock& block, int tile, uint8_t* shared, int thread) const {
    constexpr int kEights = kStep / 8;  // a pair of groups, 8 inputs
    const int items = tile_units(block, tile) * kTokens * kEights;
    const int first = first_unit(block, tile);
    for (int i = thread; i < items; i += kSmallThreads) {
      const int eight = i % kEights, token = i / kEights % kTokens, step = i / kEights / kTokens;
      const int64_t row = int64_t{block.token_tile} * kTokens + token;
      const int64_t from = int64_t{first + step} * kStep + eight * 8;
      Chunk chunk{};
      if (row < tokens && x_aligned && from + 8 <= k) {
        chunk = load_chunk(x + row * x_row + from);
      } else if (row < tokens) {
        NMS_UNROLL
        for (int j = 0; j < 8; ++j)
          if (from + j < k) set_chunk_element(&chunk, j, x[row * x_row + from + j]);
      }
      const int group = 2 * eight, lane = group / kGroups, mma = group % kGroups / 2;
      uint8_t* to = shared + step * kStepBytes + (token / 8 * kMmas + mma) * 512 + token % 8 * 64;
      NMS_UNROLL
      for (int j = 0; j < 4; ++j) {  // slots lane and lane + 4, half a group at a time
        const int c = lane % 2 * 2 + j % 2, word = lane / 2 + j / 2 * 2;
        *reinterpret_cast<uint32_t*>(to + c * 16 + word * 4) = chunk.word[j];
      }
    }
  }

  NMS_HD Read read(const SmallBlock& block, int tile, int unit, const Place& at, int lane) const {
    const int64_t step = first_unit(block, tile) + unit;
    Read found;
    NMS_UNROLL
    for (int half = 0; half < 2; ++half) {
      found.values[half] = load_once<16>(values + at.row[half] * values_row + step * 64 + lane % 4 * 16);
      const uint8_t* codes = indices + at.row[half] * indices_row + step * (kGroups * 2);
      if constexpr (kGroups == 4) {  // read four times of each sector: they are to stay in the first cache
        struct alignas(8) Two {
          uint32_t word[2];
        };
        const Two two = *reinterpret_cast<const Two*>(codes);
        found.codes[half][0] = two.word[0], found.codes[half][1] = two.word[1];
      } else {
        const Chunk four = load_chunk(codes);
        NMS_UNROLL
        for (int s = 0; s < 4; ++s) found.codes[half][s % (kGroups / 2)] = four.word[s];
      }
    }
    return found;
  }

  // A lane's part of W for mma j of its step.
  NMS_HD SparseOperand operand(const Read& read, int j, int lane) const {
    SparseOperand found;
    NMS_UNROLL
    for (int half = 0; half < 2; ++half) {
      NMS_UNROLL
      for (int o = 0; o < 2; ++o) {
        uint32_t word;
        if constexpr (V == DType::kInt8) {
          const uint32_t four = read.values[half].word[j];
          word = pack_halves<D>(word_element<V>(four, 2 * o), word_element<V>(four, 2 * o + 1));
        } else {
          word = read.values[half].word[2 * j + o];
        }
        found.a[half + 2 * o] = word;
      }
    }
    // The mma's own j or its neighbour's, whichever this lane brings metadata for: the same for both.
    const int nibble = 4 * (j / 2) + lane % 4;
    found.metadata = pick(read.codes[0], nibble) | pick(read.codes[1], nibble) << 16;
    return found;
  }

  // Where a lane finds x for mma j.
  NMS_HD const Chunk* x_operand(const uint8_t* shared, int unit, int token_tile, int j, int lane) const {
    return reinterpret_cast<const Chunk*>(shared + unit * kStepBytes + (token_tile * kMmas + j) * 512 + lane * 16);
  }

  // Step 2: a warp's sums: [warps][16 rows][tokens].
  NMS_HD void publish(const float* sums /* [NT][4] */, float* shared, int thread) const {
    const int warp = thread / 32, lane = thread % 32;
    NMS_UNROLL
    for (int i = 0; i < kSums; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, token = i / 4 * 8 + lane % 4 * 2 + i % 2;
      shared[(warp * kWarpRows + row) * kTokens + token] = sums[i];
    }
  }

  // Step 3: the parts' sums, added and written.
  NMS_HD void finish(const SmallBlock& block, const float* shared, int thread) const {
    const int block_rows = kSmallWarps / plan.parts * kWarpRows;
    for (int i = thread; i < block_rows * kTokens; i += kSmallThreads) {
      const int local = i % block_rows, t = i / block_rows;
      const int64_t row = block.row_tile * block_rows + local, token = int64_t{block.token_tile} * kTokens + t;
      if (row >= rows || token >= tokens) continue;
      const int first_warp = local / kWarpRows * plan.parts;
      float sum = 0.0f;
      for (int part = 0; part < plan.parts; ++part)
        sum += shared[((first_warp + part) * kWarpRows + local % kWarpRows) * kTokens + t];
      write<D>(block, token, row, sum);
    }
  }

 private:
  // Nibble `at` of each of the four lanes' codes, side by side.
  NMS_HD static uint32_t pick(const uint32_t* codes, int at) {
    if constexpr (kGroups == 4) {  // two lanes a word
      const uint32_t low = codes[0] >> (4 * at) & 0x000F000F, high = codes[1] >> (4 * at) & 0x000F000F;
      return ((low | low >> 12) & 0xFF) | ((high | high >> 12) & 0xFF) << 8;
    } else {
      uint32_t found = 0;
      NMS_UNROLL
      for (int s = 0; s < 4; ++s) found |= (codes[s % (kGroups / 2)] >> (4 * at) & 0xF) << (4 * s);
      return found;
    }
  }
};

// A warp of tensor cores: sums [4] += W [16, 32] x [32, 8], `odd`: lanes 2, 3 of each four bring the metadata.
#if defined(__CUDACC__)

#if __CUDACC_VER_MAJOR__ > 12 || (__CUDACC_VER_MAJOR__ == 12 && __CUDACC_VER_MINOR__ >= 5)
#define NMS_MMA_SP "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32."
#else
#define NMS_MMA_SP "mma.sp.sync.aligned.m16n8k32.row.col.f32."
#endif
#define NMS_MMA(TYPES, SELECTOR)                                                                                     \
  asm volatile(NMS_MMA_SP TYPES                                                                                      \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, "                     \
               "%12, " SELECTOR ";"                                                                                  \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                          \
               : "r"(w.a[0]), "r"(w.a[1]), "r"(w.a[2]), "r"(w.a[3]), "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]), \
                 "r"(x.word[3]), "r"(w.metadata))

template <DType D, bool kOdd>
__device__ void sparse_mma(float* sums, const SparseOperand& w, const Chunk& x) {
  if constexpr (D == DType::kFloat16) {
    if constexpr (kOdd)
      NMS_MMA("f16.f16", "0x1");
    else
      NMS_MMA("f16.f16", "0x0");
  } else {
    if constexpr (kOdd)
      NMS_MMA("bf16.bf16", "0x1");
    else
      NMS_MMA("bf16.bf16", "0x0");
  }
}

template <class Body>
__global__ void __launch_bounds__(kSmallThreads, 2) sparse_core_kernel(const __grid_constant__ Body body) {
  __shared__ Chunk memory[kSmallTileBytes / kChunkBytes];
  auto* shared = reinterpret_cast<uint8_t*>(memory);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const int64_t row_tile = body.token_tiles.quotient(blockIdx.x);
  const SmallBlock block{row_tile, static_cast<int>(blockIdx.y),
                         static_cast<int>(blockIdx.x - row_tile * body.token_tiles.value())};
  const auto at = body.place(block, thread);
  body.prefetch(block, at, thread);
  float sums[Body::kSums] = {};
  for (int tile = 0; body.tile_units(block, tile) > 0; ++tile) {
    if (tile > 0) __syncthreads();
    body.fill(block, tile, shared, thread);
    __syncthreads();
    const int count = body.tile_units(block, tile);
#pragma unroll(Body::kUnroll)
    for (int unit = thread / 32 % body.plan.parts; unit < count; unit += body.plan.parts) {  // the same for a warp
      const auto read = body.read(block, tile, unit, at, lane);
      NMS_UNROLL
      for (int j = 0; j < Body::kMmas; ++j) {
        const SparseOperand w = body.operand(read, j, lane);
        NMS_UNROLL
        for (int t = 0; t < Body::kTokens / 8; ++t) {
          const Chunk x = *body.x_operand(shared, unit, t, j, lane);
          if (j % 2 == 0)
            sparse_mma<Body::kType, false>(sums + 4 * t, w, x);
          else
            sparse_mma<Body::kType, true>(sums + 4 * t, w, x);
        }
      }
    }
  }
  __syncthreads();
  auto* joined = reinterpret_cast<float*>(memory);
  body.publish(sums, joined, thread);
  __syncthreads();
  body.finish(block, joined, thread);
}

template <DType D, DType V, int NT>
void launch_small_batch(const SparseCoreBatch<D, V, NT>& body, dim3 grid, cudaStream_t stream) {
  sparse_core_kernel<<<grid, kSmallThreads, 0, stream>>>(body);
}

#undef NMS_MMA
#undef NMS_MMA_SP
#endif  // defined(__CUDACC__)

}  // namespace nms
