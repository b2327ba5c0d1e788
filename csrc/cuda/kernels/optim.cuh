// What    One optimizer step of a list of weights, as core/optim_step.h has it; for those with a pattern also the new
//         mask, the masked weight, and the number of mask bits that changed.
// Layout  All operands of a weight have the same strides, but may differ in type: weight and state are W, gradient and
//         sparse parameter are G. Tiles are those of staged.h; a weight without a pattern is one row.
// Launch  StepTile: a block a tile of any weight of the list, which is an argument of the kernel (StepTable); the block
//         finds its weight by bisection. Steps with a barrier between: old mask to shared memory, update, choose,
//         write. StepStrided: one thread per span of lcm(m, 8) weights; what no tile fits.
#pragma once

#include <cmath>

#include "../../core/bits.h"
#include "../../core/convert.h"
#include "../../core/dtype.h"
#include "../../core/optim.h"
#include "launch.cuh"
#include "layout.h"
#include "select.cuh"
#include "staged.h"

namespace nms {

#include "../../core/optim_step.h"

// What may live on the device: read when the kernel runs, so that nothing waits for it. Null: absent.
struct StepScalars {
  const float *lr = nullptr, *grad_scale = nullptr, *found_inf = nullptr;

  NMS_HD bool skips() const { return found_inf != nullptr && *found_inf != 0; }
  NMS_HD void complete(StepOptions& options) const {
    if (lr) options.lr *= static_cast<double>(*lr);
    if (grad_scale) options.grad_scale = static_cast<double>(*grad_scale);
  }
};

NMS_HD void correct_bias(SgdOptions&, const float*) {}
NMS_HD void correct_bias(AdamWOptions& options, const float* step) {
  options.correction1 = 1 - pow(options.beta1, static_cast<double>(*step));
  options.correction2 = 1 - pow(options.beta2, static_cast<double>(*step));
}

// The constants of a weight's step.
template <class Step>
NMS_HD Step make_step(typename Step::Options options, const StepScalars& scalars, const float* step_number) {
  scalars.complete(options);
  correct_bias(options, step_number);
  return Step(options);
}

// Where the operands of a weight lie.
template <DType W, DType G>
struct StepOperands {
  static constexpr int kMaxStates = 3;

  BitsOf<W>* weight;
  const BitsOf<G>* grad;
  BitsOf<W>* state[kMaxStates];
  BitsOf<G>* sparse;         // null: a weight without a pattern
  uint8_t* bits;             // [rows, bits_row]
  int64_t bits_row;          // bytes
  int64_t* changes;          // the kernel adds to it
  const float* step_number;  // null where the optimizer does not count
  int n, m;                  // n = 0: the mask stays
};

// One weight. `state` are as many as the step has.
template <DType W, DType G, class Step>
NMS_HD void update_element(const Step& step, BitsOf<W>& weight, BitsOf<G> grad, BitsOf<W>* state, bool kept) {
  using Real = typename Arithmetic<W>::Type;
  Rounded<Real> w{to_arithmetic<W>(weight)}, held[Step::kMaxStates] = {};
  NMS_UNROLL
  for (int s = 0; s < Step::kMaxStates; ++s)
    if (s < step.states()) held[s].value = to_arithmetic<W>(state[s]);
  step(w, Rounded<Real>{static_cast<Real>(to_arithmetic<G>(grad))}, held, kept);
  weight = from_arithmetic<W>(w.value);
  NMS_UNROLL
  for (int s = 0; s < Step::kMaxStates; ++s)
    if (s < step.states()) state[s] = from_arithmetic<W>(held[s].value);
}

template <DType W, DType G>
NMS_HD BitsOf<G> narrowed(BitsOf<W> value) {
  if constexpr (W == G)
    return value;
  else
    return from_arithmetic<G>(to_arithmetic<W>(value));
}

// A weight in tiles. M = m for 2, 4, 8, 16, 32; 0: any m.
template <template <class> class StepOf, DType W, DType G, int M>
struct StepTile {
  using Step = StepOf<Rounded<typename Arithmetic<W>::Type>>;
  using WeightBits = BitsOf<W>;
  using GradBits = BitsOf<G>;
  using Select = SelectStaged<W, M>;
  static constexpr int kMinBlocks = Select::kMinBlocks < 3 ? Select::kMinBlocks : 3;  // nothing spills
  static constexpr int kPerChunk = kChunkElements<WeightBits>;
  static constexpr int kMaskBytes = kTileBytes / static_cast<int>(sizeof(WeightBits)) / 8 + 64;

  Tiles tiles;
  StepOperands<W, G> at;
  int unit;  // Select::unit_for(m)

  NMS_HD int64_t count() const { return tiles.count(); }

  // The old mask: `unit / 8` bytes for each unit of the tile.
  NMS_HD void load_mask(const Tile& tile, uint8_t* old /* [kMaskBytes] */, int thread) const {
    if (at.sparse == nullptr) return;
    const int units = unit_count(tile, unit);
    for (int u = thread; u < units; u += kStagedThreads) {
      const Unit found = unit_at(tiles, tile, unit, u);
      const uint8_t* from = mask_of(tile, found);
      for (int i = 0; i < (found.len + 7) / 8; ++i) old[u * (unit / 8) + i] = from[i];
    }
  }

  // The new weights go to shared memory too, zeros behind them up to whole units.
  NMS_HD void update(const Tile& tile, Chunk* shared, const uint8_t* old, const Step& step, int thread) const {
    const SharedTile<WeightBits> to(tiles, shared);
    const int chunks = divide_up(round_up(tile.k, unit) * tiles.pitch, kPerChunk);
    for (int c = thread; c < chunks; c += kStagedThreads) {
      const Piece piece = piece_at<WeightBits>(tiles, tile, c * kPerChunk, kPerChunk);
      Chunk& chunk = to.chunk(c);
      chunk = Chunk{};
      if (piece.valid == kPerChunk && tiles.aligned)
        update_chunk(tile, c, tile.a + piece.a, chunk, old, step);
      else
        for (int i = 0; i < piece.valid; ++i) {
          const int64_t place = tile.a + piece.a + i;
          WeightBits state[StepOperands<W, G>::kMaxStates] = {};
          for (int s = 0; s < step.states(); ++s) state[s] = at.state[s][place];
          update_element<W, G>(step, at.weight[place], at.grad[place], state, kept(tile, c * kPerChunk + i, old));
          for (int s = 0; s < step.states(); ++s) at.state[s][place] = state[s];
          to.element(c * kPerChunk + i) = at.weight[place];
        }
    }
  }

  // Masks what lies in shared memory, by the new mask or the old one.
  NMS_HD void choose(const Tile& tile, Chunk* shared, const uint8_t* old, int thread) const {
    if (at.n > 0) {
      const Select select{tiles, nullptr, at.weight, at.bits, at.bits_row, at.n, at.m, unit};
      return select.work(tile, shared, thread);
    }
    const SharedTile<WeightBits> to(tiles, shared);
    for (int e = thread; e < tile.k * tiles.pitch; e += kStagedThreads)
      if (!kept(tile, e, old)) to.element(e) = 0;
  }

  // Writes the masked weight; returns how many mask bits have changed in this thread's share of the tile.
  NMS_HD int write(const Tile& tile, Chunk* shared, const uint8_t* old, int thread) const {
    if constexpr (W == G) {
      copy_out(tiles, tile, at.sparse, shared, thread);
    } else {
      const SharedTile<WeightBits> from(tiles, shared);
      const int chunks = divide_up(tile.k * tiles.pitch, kPerChunk);
      for (int c = thread; c < chunks; c += kStagedThreads) {
        const Piece piece = piece_at<WeightBits>(tiles, tile, c * kPerChunk, kPerChunk);
        const Chunk chunk = from.chunk(c);
        GradBits* to = at.sparse + tile.a + piece.a;
        if (piece.valid == kPerChunk && tiles.aligned) {
          Neighbours<GradBits> narrow;
          NMS_UNROLL
          for (int i = 0; i < kPerChunk; ++i) narrow.element[i] = narrowed<W, G>(chunk_element<WeightBits>(&chunk, i));
          *reinterpret_cast<Neighbours<GradBits>*>(to) = narrow;
        } else {
          for (int i = 0; i < piece.valid; ++i) to[i] = narrowed<W, G>(from.element(c * kPerChunk + i));
        }
      }
    }
    int changed = 0;
    const int units = at.n > 0 ? unit_count(tile, unit) : 0;
    for (int u = thread; u < units; u += kStagedThreads) {
      const Unit found = unit_at(tiles, tile, unit, u);
      const uint8_t* fresh = mask_of(tile, found);
      for (int i = 0; i < (found.len + 7) / 8; ++i)
        changed += popcount64(static_cast<uint64_t>(fresh[i] ^ old[u * (unit / 8) + i]));
    }
    return changed;
  }

 private:
  // As many elements of another type as a chunk has weights.
  template <class T>
  struct alignas(sizeof(T) * kPerChunk) Neighbours {
    T element[kPerChunk];
  };

  NMS_HD uint8_t* mask_of(const Tile& tile, const Unit& found) const {
    return at.bits + found.row * at.bits_row + (tile.first_k + found.k) / 8;
  }

  // Whether the old mask keeps element `element` of the tile.
  NMS_HD bool kept(const Tile& tile, int element, const uint8_t* old) const {
    if (at.sparse == nullptr) return true;
    const int k = tiles.pitch == 1 ? element : element / tiles.pitch;
    const int s = element - k * tiles.pitch;
    const int number = k / unit;
    const int within = k - number * unit;
    const int u = tile.inner == 1 ? number : number * tile.inner + s;
    return old[u * (unit / 8) + within / 8] >> (within % 8) & 1;
  }

  NMS_HD void update_chunk(const Tile& tile, int c, int64_t place, Chunk& out, const uint8_t* old,
                           const Step& step) const {
    constexpr int kMaxStates = Step::kMaxStates;
    const Chunk weights = load_chunk(at.weight + place);
    const auto grads = *reinterpret_cast<const Neighbours<GradBits>*>(at.grad + place);
    Chunk state[kMaxStates], new_state[kMaxStates] = {};
    NMS_UNROLL
    for (int s = 0; s < kMaxStates; ++s)
      if (s < step.states()) state[s] = load_chunk(at.state[s] + place);
    Chunk updated{};
    NMS_UNROLL
    for (int i = 0; i < kPerChunk; ++i) {
      WeightBits weight = chunk_element<WeightBits>(&weights, i), held[kMaxStates] = {};
      NMS_UNROLL
      for (int s = 0; s < kMaxStates; ++s)
        if (s < step.states()) held[s] = chunk_element<WeightBits>(&state[s], i);
      update_element<W, G>(step, weight, grads.element[i], held, kept(tile, c * kPerChunk + i, old));
      set_chunk_element(&updated, i, weight);
      NMS_UNROLL
      for (int s = 0; s < kMaxStates; ++s)
        if (s < step.states()) set_chunk_element(&new_state[s], i, held[s]);
    }
    store_chunk(at.weight + place, updated);
    NMS_UNROLL
    for (int s = 0; s < kMaxStates; ++s)
      if (s < step.states()) store_chunk(at.state[s] + place, new_state[s]);
    out = updated;
  }
};

// A weight that is read where it lies, span by span.
template <template <class> class StepOf, DType W, DType G>
struct StepStrided {
  using Step = StepOf<Rounded<typename Arithmetic<W>::Type>>;

  Spans spans;  // of lcm(m, 8)
  StepOperands<W, G> at;

  NMS_HD int64_t count() const { return spans.count(); }

  // Returns how many mask bits have changed.
  NMS_HD int operator()(int64_t thread, const Step& step) const {
    const Spans::At span = spans.at(thread);
    const int len = static_cast<int>(span.len);
    const int64_t stride = spans.layout.a_k;
    uint8_t old[kMaxM] = {};  // lcm(m, 8) / 8 <= 64
    uint8_t* bits = at.sparse ? at.bits + span.row * at.bits_row + span.first_k / 8 : nullptr;
    if (bits)
      for (int i = 0; i < (len + 7) / 8; ++i) old[i] = bits[i];
    for (int i = 0; i < len; ++i) {
      const int64_t place = span.a + i * stride;
      BitsOf<W> state[StepOperands<W, G>::kMaxStates] = {};
      for (int s = 0; s < step.states(); ++s) state[s] = at.state[s][place];
      update_element<W, G>(step, at.weight[place], at.grad[place], state, !bits || (old[i / 8] >> (i % 8) & 1));
      for (int s = 0; s < step.states(); ++s) at.state[s][place] = state[s];
    }
    if (!bits) return 0;
    const View view{at.weight + span.a, at.sparse + span.a, stride};
    if (at.n == 0) {
      for (int i = 0; i < len; ++i) view.put(i, old[i / 8] >> (i % 8) & 1);
      return 0;
    }
    select_span<W>(view, len, at.n, at.m, bits);
    int changed = 0;
    for (int i = 0; i < (len + 7) / 8; ++i) changed += popcount64(static_cast<uint64_t>(bits[i] ^ old[i]));
    return changed;
  }

 private:
  struct View {
    const BitsOf<W>* weight;
    BitsOf<G>* sparse;
    int64_t stride;

    NMS_HD BitsOf<W> get(int i) const { return weight[i * stride]; }
    NMS_HD void put(int i, bool kept) const {
      sparse[i * stride] = kept ? narrowed<W, G>(weight[i * stride]) : BitsOf<G>{0};
    }
  };
};

// The weights of a launch. Arguments of a kernel may take 32764 bytes (CUDA 12.1, sm_70).
template <class Body>
struct StepTable {
  static constexpr int kMaxWeights = 30000 / static_cast<int>(sizeof(Body) + sizeof(int64_t));

  int weights = 0;
  int64_t first_tile[kMaxWeights + 1] = {};
  Body body[kMaxWeights];

  void append(const Body& next) {
    body[weights] = next;
    first_tile[weights + 1] = first_tile[weights] + next.count();
    ++weights;
  }

  NMS_HD int weight_of(int64_t tile) const {
    int low = 0, high = weights;  // first_tile[low] <= tile < first_tile[high]
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (first_tile[middle] <= tile)
        low = middle;
      else
        high = middle;
    }
    return low;
  }
};

#if defined(__CUDACC__)

__device__ __forceinline__ void add_changes(int changed, int64_t* changes) {  // whole warps only
  for (int distance = 16; distance > 0; distance /= 2) changed += __shfl_down_sync(0xFFFFFFFFu, changed, distance);
  if (threadIdx.x % 32 == 0 && changed != 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(changes), static_cast<unsigned long long>(changed));
}

template <class Body>
__global__ void __launch_bounds__(kStagedThreads, Body::kMinBlocks)
    step_kernel(const __grid_constant__ StepTable<Body> table, typename Body::Step::Options options,
                StepScalars scalars) {
  __shared__ Chunk shared[kTileChunks];
  __shared__ uint8_t old[Body::kMaskBytes];
  __shared__ alignas(16) unsigned char constants[sizeof(typename Body::Step)];
  if (scalars.skips()) return;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t number = blockIdx.x;
  const int index = table.weight_of(number);
  const Body& body = table.body[index];
  const Tile tile = tile_at(body.tiles, number - table.first_tile[index]);
  if (thread == 0)
    *reinterpret_cast<typename Body::Step*>(constants) =
        make_step<typename Body::Step>(options, scalars, body.at.step_number);
  body.load_mask(tile, old, thread);
  __syncthreads();
  body.update(tile, shared, old, *reinterpret_cast<const typename Body::Step*>(constants), thread);
  if (body.at.sparse == nullptr) return;
  __syncthreads();
  body.choose(tile, shared, old, thread);
  __syncthreads();
  add_changes(body.write(tile, shared, old, thread), body.at.changes);
}

template <class Body>
void launch_step(const StepTable<Body>& table, const typename Body::Step::Options& options, const StepScalars& scalars,
                 cudaStream_t stream) {
  const int64_t blocks = table.first_tile[table.weights];  // a tile is at least 2 KiB: never beyond the grid's limit
  if (blocks > 0)
    step_kernel<Body><<<static_cast<unsigned>(blocks), kStagedThreads, 0, stream>>>(table, options, scalars);
}

template <class Body>
__global__ void __launch_bounds__(kMapThreads, 2)
    strided_step_kernel(const __grid_constant__ Body body, typename Body::Step::Options options, StepScalars scalars) {
  if (scalars.skips()) return;
  const auto step = make_step<typename Body::Step>(options, scalars, body.at.step_number);
  const int64_t count = body.count();
  int changed = 0;
  for (int64_t i = int64_t{blockIdx.x} * kMapThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kMapThreads)
    changed += body(i, step);
  if (body.at.sparse) add_changes(changed, body.at.changes);
}

template <class Body>
void launch_strided_step(const Body& body, const typename Body::Step::Options& options, const StepScalars& scalars,
                         cudaStream_t stream) {
  constexpr int64_t kMaxGrid = 1 << 16;
  const int64_t blocks = divide_up(body.count(), kMapThreads);
  if (blocks > 0)
    strided_step_kernel<<<static_cast<unsigned>(std::min(blocks, kMaxGrid)), kMapThreads, 0, stream>>>(body, options,
                                                                                                       scalars);
}

#endif  // defined(__CUDACC__)

}  // namespace nms
