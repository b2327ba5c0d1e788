// NMS_HD marks arithmetic that the CPU kernels, the CUDA kernels and the host tests share.
#pragma once

#if defined(__CUDACC__)
#define NMS_HD __host__ __device__ __forceinline__
#else
#define NMS_HD inline
#endif
