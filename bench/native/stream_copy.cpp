// The ceilings that the CPU benches compare with: memory copied past the cache, and memory read. Not part of the
// package: bench/common.py compiles it when a bench starts.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kChunk = 65536;  // bytes per turn of a thread

__attribute__((target("avx512f"))) void copy_avx512(const char* src, char* dst, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i), _mm512_loadu_si512(src + i));
  _mm_sfence();
}

__attribute__((target("avx2"))) void copy_avx2(const char* src, char* dst, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)));
  _mm_sfence();
}

__attribute__((target("avx512f"))) int64_t read_avx512(const char* src, int64_t bytes) {
  __m512i a = _mm512_setzero_si512(), b = a;
  for (int64_t i = 0; i < bytes; i += 128) {
    a = _mm512_xor_si512(a, _mm512_loadu_si512(src + i));
    b = _mm512_xor_si512(b, _mm512_loadu_si512(src + i + 64));
  }
  int64_t words[8];
  _mm512_storeu_si512(words, _mm512_xor_si512(a, b));
  return words[0] ^ words[1] ^ words[2] ^ words[3] ^ words[4] ^ words[5] ^ words[6] ^ words[7];
}

__attribute__((target("avx2"))) int64_t read_avx2(const char* src, int64_t bytes) {
  __m256i a = _mm256_setzero_si256(), b = a;
  for (int64_t i = 0; i < bytes; i += 64) {
    a = _mm256_xor_si256(a, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)));
    b = _mm256_xor_si256(b, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i + 32)));
  }
  int64_t words[4];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(words), _mm256_xor_si256(a, b));
  return words[0] ^ words[1] ^ words[2] ^ words[3];
}

bool has_avx512() {
  static const bool yes = __builtin_cpu_supports("avx512f");
  return yes;
}

}  // namespace

// bytes is a multiple of 64 KiB; dst is aligned to 64 bytes.
extern "C" void stream_copy(const char* src, char* dst, int64_t bytes, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t chunk = 0; chunk < bytes / kChunk; ++chunk) {
    if (has_avx512())
      copy_avx512(src + chunk * kChunk, dst + chunk * kChunk, kChunk);
    else
      copy_avx2(src + chunk * kChunk, dst + chunk * kChunk, kChunk);
  }
}

extern "C" int64_t stream_read(const char* src, int64_t bytes, int threads) {
  int64_t result = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(^ : result)
  for (int64_t chunk = 0; chunk < bytes / kChunk; ++chunk)
    result ^= has_avx512() ? read_avx512(src + chunk * kChunk, kChunk) : read_avx2(src + chunk * kChunk, kChunk);
  return result;
}
