// Sixteen bytes: what one thread moves at a time, and what a mask does to them.
#pragma once

#include <cstdint>
#include <cstring>

#include "../../core/hd.h"

// Loops over register arrays must be unrolled: an index known only at run time moves the array to slow local memory.
#if defined(__CUDACC__)
#define NMS_UNROLL _Pragma("unroll")
#define NMS_KEEP_LOOP _Pragma("unroll 1")  // rare work: not worth registers
#else
#define NMS_UNROLL
#define NMS_KEEP_LOOP
#endif

namespace nms {

constexpr int kChunkBytes = 16;

// Stands for elements of any type.
struct [[gnu::may_alias]] alignas(kChunkBytes) Chunk {
  uint32_t word[4];
};

template <class Bits>
constexpr int kChunkElements = kChunkBytes / static_cast<int>(sizeof(Bits));

NMS_HD bool is_aligned(const void* pointer, int bytes /* a power of two */) {
  return (reinterpret_cast<uintptr_t>(pointer) & (bytes - 1u)) == 0;
}

// The i-th element of consecutive chunks. `i` must be known at compile time, after unrolling.
template <class Bits>
NMS_HD Bits chunk_element(const Chunk* chunks, int i) {
  if constexpr (sizeof(Bits) == 8) {
    const uint32_t* word = &chunks[i / 2].word[2 * (i % 2)];
    return static_cast<Bits>(uint64_t{word[1]} << 32 | word[0]);
  } else {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(Bits));
    const int word = i / kPerWord;
    return static_cast<Bits>(chunks[word / 4].word[word % 4] >> (32 / kPerWord * (i % kPerWord)));
  }
}

template <class Bits>
NMS_HD void set_chunk_element(Chunk* chunks /* zero there */, int i, Bits value) {
  if constexpr (sizeof(Bits) == 8) {
    chunks[i / 2].word[2 * (i % 2)] = static_cast<uint32_t>(value);
    chunks[i / 2].word[2 * (i % 2) + 1] = static_cast<uint32_t>(value >> 32);
  } else {
    constexpr int kPerWord = 4 / static_cast<int>(sizeof(Bits));
    const int word = i / kPerWord;
    chunks[word / 4].word[word % 4] |= static_cast<uint32_t>(value) << (32 / kPerWord * (i % kPerWord));
  }
}

// Keeps the elements whose bit is set (bit i: element i) and makes the others +0.
template <class Bits>
NMS_HD Chunk masked(const Chunk& chunk, uint32_t bits) {
  Chunk out;
  NMS_UNROLL
  for (int w = 0; w < 4; ++w) {
    uint32_t keep;
    if constexpr (sizeof(Bits) == 8) {
      keep = 0u - (bits >> (w / 2) & 1);
    } else if constexpr (sizeof(Bits) == 4) {
      keep = 0u - (bits >> w & 1);
    } else if constexpr (sizeof(Bits) == 2) {
      const uint32_t two = bits >> (2 * w);
      keep = (two & 1) * 0xffffu | (two >> 1 & 1) * 0xffff0000u;
    } else {
      const uint32_t four = bits >> (4 * w) & 0xf;
      keep = ((four * 0x00204081u) & 0x01010101u) * 0xffu;  // bit i to the lowest bit of byte i, then to all of it
    }
    out.word[w] = chunk.word[w] & keep;
  }
  return out;
}

// One aligned 16-byte access.
NMS_HD Chunk load_chunk(const void* pointer) { return *static_cast<const Chunk*>(pointer); }
NMS_HD void store_chunk(void* pointer, const Chunk& chunk) { *static_cast<Chunk*>(pointer) = chunk; }

// From global to shared memory without passing through registers; it has arrived after wait_for_copies().
NMS_HD void copy_chunk_async(void* shared, const void* global) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
      "l"(__cvta_generic_to_global(global))
      : "memory");
#else
  store_chunk(shared, load_chunk(global));
#endif
}

NMS_HD void wait_for_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// `bytes` (1, 2, 4 or 8) of a word in one access; `pointer` must be a multiple of it.
NMS_HD void store_word(void* pointer, uint64_t word, int bytes) {
  switch (bytes) {
    case 1:
      *static_cast<uint8_t*>(pointer) = static_cast<uint8_t>(word);
      break;
    case 2:
      *static_cast<uint16_t*>(pointer) = static_cast<uint16_t>(word);
      break;
    case 4:
      *static_cast<uint32_t*>(pointer) = static_cast<uint32_t>(word);
      break;
    default:
      *static_cast<uint64_t*>(pointer) = word;
      break;
  }
}

// The lowest `bytes` bytes of a word, in one access where `pointer` allows it.
NMS_HD void store_bytes(uint8_t* pointer, uint64_t word, int bytes) {
  if ((bytes & (bytes - 1)) == 0 && is_aligned(pointer, bytes)) {
    store_word(pointer, word, bytes);
  } else {
    NMS_KEEP_LOOP
    for (int i = 0; i < bytes; ++i) pointer[i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

}  // namespace nms
