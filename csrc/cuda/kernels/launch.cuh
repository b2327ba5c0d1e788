// How kernels are started: grids, and the one kernel that runs a functor over an index range.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../../core/hd.h"
#include "staged.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>

namespace nms {

constexpr int kMapThreads = 256;

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
  constexpr int64_t kMaxGrid = 1 << 20;  // keeps any GPU busy; its threads loop over what it leaves
  const int64_t blocks = divide_up(body.count(), kMapThreads);
  if (blocks > 0) map_kernel<<<static_cast<unsigned>(std::min(blocks, kMaxGrid)), kMapThreads, 0, stream>>>(body);
}

// A block a tile: copy in, work, copy out. Body: see SelectStaged.
template <class Body>
__global__ void __launch_bounds__(kStagedThreads, Body::kMinBlocks)
    staged_kernel(const __grid_constant__ Body body, int64_t first_tile) {
  __shared__ Chunk shared[kTileChunks];
  const int thread = static_cast<int>(threadIdx.x);
  const Tile tile = tile_at(body.tiles, first_tile + blockIdx.x);
  body.copy_in(tile, shared, thread);
  wait_for_copies();
  __syncthreads();
  body.work(tile, shared, thread);
  if (body.writes_tile()) {
    __syncthreads();
    body.copy_out(tile, shared, thread);
  }
}

template <class Body>
void launch_staged(const Body& body, cudaStream_t stream) {
  constexpr int64_t kMaxGrid = 0x7FFFFFFF;  // what the hardware takes: terabytes
  const int64_t count = body.count();
  for (int64_t first = 0; first < count; first += kMaxGrid)
    staged_kernel<<<static_cast<unsigned>(std::min(count - first, kMaxGrid)), kStagedThreads, 0, stream>>>(body, first);
}

}  // namespace nms
#endif  // defined(__CUDACC__)
