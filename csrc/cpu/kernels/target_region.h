// Marks a region of a source file as compiled for a wider instruction set than the rest of the program.
//
//   #include ...                                  // std and shared headers: before the region
//   NMS_TARGET_REGION("avx2,popcnt")
//   namespace nms { namespace { ... } }           // all helpers without external linkage
//   NMS_TARGET_REGION_END
//
// Why not a compiler flag per file: an inline function of a shared header, compiled in a file with -mavx512f, is emitted
// as a weak symbol full of AVX-512, and the linker may choose it for callers that must run everywhere. Why not
// __attribute__((target)) on functions: templates and lambdas inside do not inherit it.
#pragma once

#define NMS_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define NMS_TARGET_REGION(features) \
  NMS_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define NMS_TARGET_REGION_END _Pragma("clang attribute pop")
#define NMS_UNROLL _Pragma("clang loop unroll(full)")
#else
#define NMS_TARGET_REGION(features) _Pragma("GCC push_options") NMS_PRAGMA(GCC target(features))
#define NMS_TARGET_REGION_END _Pragma("GCC pop_options")
#define NMS_UNROLL _Pragma("GCC unroll 32")
#endif

// Networks over arrays of vectors only stay in registers when every step is inlined into one function.
#define NMS_INLINE inline __attribute__((always_inline))
