// How kernels are started: grids, and the one kernel that runs a functor over an index range.
#pragma once

#include <cstdint>

#include "../../core/hd.h"
#include "staged.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace nms {

// Kernels loop over what their grid leaves, so a grid need not be larger than this to keep any GPU busy.
constexpr int64_t kMaxBlocks = 1 << 20;
constexpr int kMapThreads = 256;

inline unsigned grid_size(int64_t blocks) { return static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks); }

// Blocks that share a multiprocessor, at least: the compiler gives each thread the registers that this leaves.
template <class Body>
constexpr int map_blocks() {
  if constexpr (requires { Body::kMinBlocks; })
    return Body::kMinBlocks;
  else
    return 3;
}

// body(i) for every i below body.count(), in any order: bodies share nothing.
template <class Body>
__global__ void __launch_bounds__(kMapThreads, map_blocks<Body>()) map_kernel(const __grid_constant__ Body body) {
  const int64_t count = body.count();
  const int64_t step = int64_t{gridDim.x} * kMapThreads;
  for (int64_t i = int64_t{blockIdx.x} * kMapThreads + threadIdx.x; i < count; i += step) body(i);
}

template <class Body>
void launch_map(const Body& body, cudaStream_t stream) {
  const int64_t count = body.count();
  if (count > 0) map_kernel<<<grid_size((count + kMapThreads - 1) / kMapThreads), kMapThreads, 0, stream>>>(body);
}

// One tile after the other: copy in, work, copy out. Body: see SelectStaged.
template <class Body>
__global__ void __launch_bounds__(kStagedThreads, Body::kMinBlocks) staged_kernel(const __grid_constant__ Body body) {
  __shared__ Chunk shared[kTileChunks];
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t count = body.count();
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const Tile tile = tile_at(body.tiles, i);
    body.copy_in(tile, shared, thread);
    wait_for_copies();
    __syncthreads();
    body.work(tile, shared, thread);
    __syncthreads();
    if (body.writes_tile()) {
      body.copy_out(tile, shared, thread);
      __syncthreads();  // before the next tile comes in
    }
  }
}

template <class Body>
void launch_staged(const Body& body, cudaStream_t stream) {
  const int64_t count = body.count();
  if (count > 0) staged_kernel<<<grid_size(count), kStagedThreads, 0, stream>>>(body);
}

}  // namespace nms
#endif  // defined(__CUDACC__)
