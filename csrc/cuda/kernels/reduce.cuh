// What    Questions about a whole tensor with one number as the answer: how many bits differ, which group is the first
//         to violate its pattern or to have a bad code.
// Layout  A body gives an unsigned number per index; the answer is their sum or their minimum. -1 as "none" is the
//         largest unsigned number, so "first" is a minimum.
// Launch  Few blocks that loop, one atomic operation each; the answer stays on the device.
#pragma once

#include "../../core/bits.h"
#include "../../core/dtype.h"
#include "../../core/packed.h"
#include "chunk.h"
#include "launch.cuh"
#include "layout.h"

namespace nms {

constexpr uint64_t kNone = ~uint64_t{0};

// Bits that differ between two byte strings; index: 16 bytes.
struct CountDiffering {
  const uint8_t* x;
  const uint8_t* y;
  int64_t bytes;
  bool aligned;

  NMS_HD int64_t count() const { return divide_up(bytes, kChunkBytes); }

  NMS_HD uint64_t operator()(int64_t index) const {
    const int64_t first = index * kChunkBytes;
    int differing = 0;
    if (aligned && first + kChunkBytes <= bytes) {
      const Chunk a = load_chunk(x + first), b = load_chunk(y + first);
      NMS_UNROLL
      for (int i = 0; i < 4; ++i) differing += popcount64(a.word[i] ^ b.word[i]);
    } else {
      for (int64_t i = first; i < bytes && i < first + kChunkBytes; ++i) differing += popcount64(x[i] ^ y[i]);
    }
    return static_cast<uint64_t>(differing);
  }
};

// A violating group and its nonzeros, in one number that orders by group.
constexpr int kNonzeroBits = 7;  // at most 64

NMS_HD uint64_t join_violation(int64_t group, int nonzeros) {
  return static_cast<uint64_t>(group) << kNonzeroBits | static_cast<uint64_t>(nonzeros);
}
NMS_HD void split_violation(uint64_t joined, int64_t* result /* [2] */) {
  result[0] = joined == kNone ? -1 : static_cast<int64_t>(joined >> kNonzeroBits);
  result[1] = joined == kNone ? 0 : static_cast<int64_t>(joined & low_bits(kNonzeroBits));
}

// More than n nonzeros in a group; index: a group.
template <DType D>
struct FindViolation {
  Spans spans;  // of m
  const typename Element<D>::Bits* w;
  int n;

  NMS_HD int64_t count() const { return spans.count(); }

  NMS_HD uint64_t operator()(int64_t index) const {
    const Spans::At at = spans.at(index);
    int nonzeros = 0;
    for (int i = 0; i < static_cast<int>(at.len); ++i)
      nonzeros += magnitude_key<D>(w[at.a + i * spans.layout.a_k]) != 0;
    return nonzeros > n ? join_violation(at.row * spans.per_row.value() + at.index, nonzeros) : kNone;
  }
};

// A code that is not legal, or bits behind a row's last code; index: a group.
struct FindBadIndices {
  const uint8_t* indices;  // [rows, index_row_bytes]
  int64_t rows;
  Divisor groups;  // per row
  PackedFormat format;

  NMS_HD int64_t count() const { return rows * groups.value(); }

  NMS_HD uint64_t operator()(int64_t index) const {
    const int64_t row = groups.quotient(index);
    const int64_t group = index - row * groups.value();
    const uint8_t* codes = indices + row * index_row_bytes(format, groups.value());
    bool good = is_legal_code(read_bits(codes, group * format.group_bits, format.group_bits), format);
    const int64_t used = groups.value() * format.group_bits;
    if (group == groups.value() - 1 && used % 8 != 0) good = good && codes[used / 8] >> (used % 8) == 0;
    return good ? kNone : static_cast<uint64_t>(index);
  }
};

#if defined(__CUDACC__)

struct Sum {
  static constexpr int kStart = 0x00;  // byte of the neutral element, for memset
  static __device__ uint64_t neutral() { return 0; }
  static __device__ uint64_t join(uint64_t a, uint64_t b) { return a + b; }
  static __device__ void join_atomic(uint64_t* to, uint64_t value) {
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
  }
};

struct Minimum {
  static constexpr int kStart = 0xFF;
  static __device__ uint64_t neutral() { return kNone; }
  static __device__ uint64_t join(uint64_t a, uint64_t b) { return a < b ? a : b; }
  static __device__ void join_atomic(uint64_t* to, uint64_t value) {
    atomicMin(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value));
  }
};

template <class How, class Body>
__global__ void __launch_bounds__(kMapThreads, map_blocks<Body>())
    reduce_kernel(const __grid_constant__ Body body, uint64_t* answer) {
  __shared__ uint64_t of_warp[kMapThreads / 32];
  uint64_t value = How::neutral();
  const int64_t count = body.count();
  const int64_t step = int64_t{gridDim.x} * kMapThreads;
  for (int64_t i = int64_t{blockIdx.x} * kMapThreads + threadIdx.x; i < count; i += step)
    value = How::join(value, body(i));

  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int distance = 16; distance > 0; distance /= 2)
    value = How::join(value, __shfl_down_sync(0xFFFFFFFFu, value, distance));
  if (lane == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kMapThreads / 32; ++warp) value = How::join(value, of_warp[warp]);
  if (value != How::neutral()) How::join_atomic(answer, value);
}

static __global__ void split_violation_kernel(int64_t* result /* [2], [0]: joined */) {
  split_violation(static_cast<uint64_t>(result[0]), result);
}

// Sets *answer, on the stream.
template <class How, class Body>
void launch_reduce(const Body& body, int64_t* answer, cudaStream_t stream) {
  constexpr int64_t kReduceBlocks = 1056;  // 8 blocks of 256 threads fill a multiprocessor; the largest GPUs have 132
  cudaMemsetAsync(answer, How::kStart, sizeof(*answer), stream);
  const int64_t blocks = divide_up(body.count(), kMapThreads);
  if (blocks > 0)
    reduce_kernel<How><<<static_cast<unsigned>(std::min(blocks, kReduceBlocks)), kMapThreads, 0, stream>>>(
        body, reinterpret_cast<uint64_t*>(answer));
}

#endif  // defined(__CUDACC__)

}  // namespace nms
