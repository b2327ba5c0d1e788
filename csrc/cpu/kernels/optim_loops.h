// What    Walks a panel of weights, gradients and optimizer state and makes the step of core/optim.h on each.
// Layout  As UpdatePanel. Lanes holds kConvertLanes numbers; the rest of a row goes through a padded copy.
//
// Note    Included inside a target region, after convert_lanes.h and a header that defines Lanes and KeptLanes.
#pragma once

template <DType D>
NMS_INLINE Lanes load_lanes(const typename Element<D>::Bits* from) {
  if constexpr (D == DType::kFloat32) {
    return Lanes::load(from);
  } else {
    alignas(64) float wide[kConvertLanes];
    Conversion<D>::widen(from, wide);
    return Lanes::load(wide);
  }
}

template <DType D>
NMS_INLINE void store_lanes(typename Element<D>::Bits* to, Lanes v) {
  if constexpr (D == DType::kFloat32) {
    v.store(to);
  } else {
    alignas(64) float wide[kConvertLanes];
    v.store(wide);
    Conversion<D>::narrow(wide, to);
  }
}

template <class T>
NMS_INLINE const T* copy_padded(const T* from, int count, T* copy /* [kConvertLanes] */) {
  std::memset(copy, 0, kConvertLanes * sizeof(T));
  std::memcpy(copy, from, static_cast<size_t>(count) * sizeof(T));
  return copy;
}

// How far ahead of its loads a row asks for memory: the processor's own prefetchers lose so many streams.
constexpr int kAheadBytes = 2048;

template <class T>
NMS_INLINE void ask_ahead(const T* from) {
  _mm_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes, _MM_HINT_T0);
}

// One row. kept_at(i, count) is the mask of up to kConvertLanes weights from i on.
template <DType W, DType G, class Step, class KeptAt>
NMS_INLINE void update_row(const Step& step, typename Element<W>::Bits* w, const typename Element<G>::Bits* g,
                           typename Element<W>::Bits* const* state, int64_t count, KeptAt kept_at) {
  using WeightBits = typename Element<W>::Bits;
  using GradBits = typename Element<G>::Bits;
  constexpr int kMaxStates = Step::kMaxStates;
  const int states = step.states();
  int64_t i = 0;
  for (; i + kConvertLanes <= count; i += kConvertLanes) {
    ask_ahead(w + i);
    ask_ahead(g + i);
    Lanes weight = load_lanes<W>(w + i), held[kMaxStates] = {};
    NMS_UNROLL
    for (int s = 0; s < kMaxStates; ++s)
      if (s < states) {
        ask_ahead(state[s] + i);
        held[s] = load_lanes<W>(state[s] + i);
      }
    step(weight, load_lanes<G>(g + i), held, kept_at(i, kConvertLanes));
    store_lanes<W>(w + i, weight);
    NMS_UNROLL
    for (int s = 0; s < kMaxStates; ++s)
      if (s < states) store_lanes<W>(state[s] + i, held[s]);
  }
  if (i == count) return;
  const int rest = static_cast<int>(count - i);
  const size_t bytes = static_cast<size_t>(rest) * sizeof(WeightBits);
  alignas(64) WeightBits copy[kConvertLanes];
  alignas(64) GradBits grad_copy[kConvertLanes];
  Lanes weight = load_lanes<W>(copy_padded(w + i, rest, copy)), held[kMaxStates] = {};
  for (int s = 0; s < states; ++s) held[s] = load_lanes<W>(copy_padded(state[s] + i, rest, copy));
  step(weight, load_lanes<G>(copy_padded(g + i, rest, grad_copy)), held, kept_at(i, rest));
  store_lanes<W>(copy, weight);
  std::memcpy(w + i, copy, bytes);
  for (int s = 0; s < states; ++s) {
    store_lanes<W>(copy, held[s]);
    std::memcpy(state[s] + i, copy, bytes);
  }
}

template <DType W, DType G, class Step>
void update_panel(const UpdatePanel& p, const Step& step) {
  using WeightBits = typename Element<W>::Bits;
  using GradBits = typename Element<G>::Bits;
  for (int64_t row = 0; row < p.outer; ++row) {
    const int64_t at = row * p.stride;
    WeightBits* state[3] = {};
    for (int s = 0; s < step.states(); ++s) state[s] = static_cast<WeightBits*>(p.state[s]) + at;
    WeightBits* w = static_cast<WeightBits*>(p.weight) + at;
    const GradBits* g = static_cast<const GradBits*>(p.grad) + at;
    if (p.bits) {
      const uint8_t* bits = p.bits + row * p.bits_row;
      update_row<W, G>(step, w, g, state, p.inner, [bits](int64_t i, int count) {
        uint16_t word = 0;
        std::memcpy(&word, bits + i / 8, static_cast<size_t>(count > 8 ? 2 : 1));
        return KeptLanes::of_bits(word);
      });
    } else if (p.words) {
      const uint32_t* words = p.words + row * p.inner;
      update_row<W, G>(step, w, g, state, p.inner, [words](int64_t i, int count) {
        alignas(64) uint32_t copy[kConvertLanes];
        return KeptLanes::of_words(count == kConvertLanes ? words + i : copy_padded(words + i, count, copy));
      });
    } else {
      update_row<W, G>(step, w, g, state, p.inner, [](int64_t, int) { return KeptLanes::all(); });
    }
  }
}

inline void scalar_update(DType weight, DType grad, const UpdatePanel& p, const SgdOptions& options) {
  scalar_optim().sgd(weight, grad, p, options);
}
inline void scalar_update(DType weight, DType grad, const UpdatePanel& p, const AdamWOptions& options) {
  scalar_optim().adamw(weight, grad, p, options);
}

template <template <class> class Step, class Options>
void update(DType weight, DType grad, const UpdatePanel& p, const Options& options) {
  if (weight == DType::kFloat64) return scalar_update(weight, grad, p, options);
  const Step<Lanes> step(options);
  if (weight == DType::kFloat32) {
    if (grad == DType::kFloat32) return update_panel<DType::kFloat32, DType::kFloat32>(p, step);
    if (grad == DType::kBFloat16) return update_panel<DType::kFloat32, DType::kBFloat16>(p, step);
    return update_panel<DType::kFloat32, DType::kFloat16>(p, step);
  }
  if (weight == DType::kBFloat16) return update_panel<DType::kBFloat16, DType::kBFloat16>(p, step);
  update_panel<DType::kFloat16, DType::kFloat16>(p, step);
}

inline void narrow(DType to_type, const float* from, void* to, int64_t count) {
  const auto run = [&](auto d) {
    using Bits = typename Element<d>::Bits;
    Bits* out = static_cast<Bits*>(to);
    int64_t i = 0;
    for (; i + kConvertLanes <= count; i += kConvertLanes) Conversion<d>::narrow(from + i, out + i);
    for (; i < count; ++i) out[i] = from_arithmetic<d>(from[i]);
  };
  if (to_type == DType::kBFloat16)
    run(std::integral_constant<DType, DType::kBFloat16>{});
  else
    run(std::integral_constant<DType, DType::kFloat16>{});
}

inline OptimTable lanes_table() { return {update<Sgd, SgdOptions>, update<AdamW, AdamWOptions>, narrow}; }
