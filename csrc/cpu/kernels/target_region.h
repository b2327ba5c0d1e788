// Marks a region of a source file as compiled for a wider instruction set than the rest of the program.
//
//   #include ...                                  // std and shared headers: before the region
//   NMS_TARGET_REGION("avx2,popcnt")
//   namespace nms { namespace { ... } }           // all helpers without external linkage
//   NMS_TARGET_REGION_END
//
// Why not a compiler flag per file: an inline function of a shared header, compiled in a file with -mavx512f, is
// emitted as a weak symbol full of AVX-512, and the linker may choose it for callers that must run everywhere. Why not
// __attribute__((target)) on functions: templates and lambdas inside do not inherit it.
#pragma once

#define NMS_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define NMS_TARGET_REGION(features) \
  NMS_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define NMS_TARGET_REGION_END _Pragma("clang attribute pop")
#define NMS_UNROLL _Pragma("clang loop unroll(full)")
#define NMS_VECTORIZE _Pragma("clang loop vectorize(enable)")
#else
#define NMS_TARGET_REGION(features) _Pragma("GCC push_options") NMS_PRAGMA(GCC target(features))
#define NMS_TARGET_REGION_END _Pragma("GCC pop_options")
#define NMS_UNROLL _Pragma("GCC unroll 32")
// GCC unrolls short loops before it looks for vectors, and then finds none in what is left.
#define NMS_VECTORIZE _Pragma("GCC unroll 1") _Pragma("GCC ivdep")
#endif

// Clang 18 to 20 want 512-bit registers asked for by name, other compilers do not know the name.
#if defined(__clang__) && __clang_major__ >= 18 && __clang_major__ <= 20
#define NMS_AVX512 "evex512,avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt"
#define NMS_AVX512_VBMI2 "evex512,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,bmi,bmi2,popcnt"
#else
#define NMS_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,bmi,bmi2,popcnt"
#define NMS_AVX512_VBMI2 "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi2,avx2,bmi,bmi2,popcnt"
#endif

// Networks over arrays of vectors only stay in registers when every step is inlined into one function.
#define NMS_INLINE inline __attribute__((always_inline))
