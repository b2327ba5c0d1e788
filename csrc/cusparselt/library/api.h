// The part of cuSPARSELt's C interface that this project calls, as a table of function pointers: no header of the
// library is needed to compile, and none of its versions is bound to. Numbers are the ABI's, the same in 0.6 to 0.10;
// what differs between these versions is the size of the opaque descriptors (descriptor_bytes) and which functions
// exist (the optional ones are null where they do not).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace nms::lt {

using Status = int;  // cusparseStatus_t
constexpr Status kSuccess = 0, kNotInitialized = 1, kAllocFailed = 2, kInvalidValue = 3, kArchMismatch = 4,
                 kExecutionFailed = 6, kInternalError = 7, kNotSupported = 10;

struct Version {
  int major = 0, minor = 0, patch = 0;

  std::string text() const { return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch); }
};

// A descriptor or a handle of any kind: `descriptor_bytes` bytes that the library fills and that must never move.
using Opaque = void;

// Room for the largest descriptor of a version, kept in memory that is aligned to kDescriptorAlignment.
constexpr size_t kDescriptorAlignment = 64;
constexpr size_t descriptor_bytes(Version version) {
  return version.major == 0 && version.minor <= 6 ? 13120 : version.major == 0 && version.minor == 7 ? 1024 : 512;
}

enum class CudaType : int { kR32F = 0, kR16F = 2, kR8I = 3, kR32I = 10, kR16BF = 14, kR8FE4M3 = 28 };
enum class Order : int { kColumn = 1, kRow = 2 };
enum class Operation : int { kNone = 0, kTranspose = 1 };
enum class Compute : int { k32I = 0, k16F = 1, k32F = 2 };
enum class Sparsity : int { kHalf = 0 };
enum class MatAttribute : int { kNumBatches = 0, kBatchStride = 1 };
enum class MatmulAttribute : int {
  kRelu = 0,
  kGelu = 3,
  kAlphaVectorScaling = 5,
  kBiasStride = 7,
  kBiasPointer = 8,
};
enum class Algorithm : int { kDefault = 0 };
enum class AlgorithmAttribute : int { kConfigId = 0, kConfigMaxId = 1, kSplitK = 3, kSplitKMode = 4 };

struct Api {
  Version version;
  std::string path;  // what was loaded, for messages

  Status (*Init)(Opaque* handle);
  Status (*Destroy)(const Opaque* handle);
  Status (*GetProperty)(int property, int* value);
  Status (*DenseDescriptorInit)(const Opaque* handle, Opaque* mat, int64_t rows, int64_t cols, int64_t ld,
                                uint32_t alignment, CudaType type, Order order);
  Status (*StructuredDescriptorInit)(const Opaque* handle, Opaque* mat, int64_t rows, int64_t cols, int64_t ld,
                                     uint32_t alignment, CudaType type, Order order, Sparsity sparsity);
  Status (*MatDescriptorDestroy)(const Opaque* mat);
  Status (*MatDescSetAttribute)(const Opaque* handle, Opaque* mat, MatAttribute attribute, const void* data,
                                size_t bytes);
  Status (*MatmulDescriptorInit)(const Opaque* handle, Opaque* matmul, Operation a_op, Operation b_op, const Opaque* a,
                                 const Opaque* b, const Opaque* c, const Opaque* d, Compute compute);
  Status (*MatmulDescSetAttribute)(const Opaque* handle, Opaque* matmul, MatmulAttribute attribute, const void* data,
                                   size_t bytes);
  Status (*MatmulAlgSelectionInit)(const Opaque* handle, Opaque* selection, const Opaque* matmul, Algorithm algorithm);
  Status (*MatmulAlgSetAttribute)(const Opaque* handle, Opaque* selection, AlgorithmAttribute attribute,
                                  const void* data, size_t bytes);
  Status (*MatmulAlgGetAttribute)(const Opaque* handle, const Opaque* selection, AlgorithmAttribute attribute,
                                  void* data, size_t bytes);
  Status (*MatmulPlanInit)(const Opaque* handle, Opaque* plan, const Opaque* matmul, const Opaque* selection);
  Status (*MatmulPlanDestroy)(const Opaque* plan);
  Status (*MatmulGetWorkspace)(const Opaque* handle, const Opaque* plan, size_t* bytes);
  Status (*Matmul)(const Opaque* handle, const Opaque* plan, const void* alpha, const void* a, const void* b,
                   const void* beta, const void* c, void* d, void* workspace, void** streams, int32_t stream_count);
  Status (*SpMMACompressedSize2)(const Opaque* handle, const Opaque* sparse_mat, size_t* compressed, size_t* scratch);
  Status (*SpMMACompress2)(const Opaque* handle, const Opaque* sparse_mat, int sparse_is_a, Operation op,
                           const void* dense, void* compressed, void* scratch, void* stream);

  // Optional: from 0.8 on.
  Status (*MatmulAlgSelectionDestroy)(const Opaque* selection) = nullptr;
};

// X(name) for every function of the table; the library's symbols are these names with "cusparseLt" before them.
#define NMS_LT_REQUIRED_FUNCTIONS(X) \
  X(Init)                            \
  X(Destroy)                         \
  X(GetProperty)                     \
  X(DenseDescriptorInit)             \
  X(StructuredDescriptorInit)        \
  X(MatDescriptorDestroy)            \
  X(MatDescSetAttribute)             \
  X(MatmulDescriptorInit)            \
  X(MatmulDescSetAttribute)          \
  X(MatmulAlgSelectionInit)          \
  X(MatmulAlgSetAttribute)           \
  X(MatmulAlgGetAttribute)           \
  X(MatmulPlanInit)                  \
  X(MatmulPlanDestroy)               \
  X(MatmulGetWorkspace)              \
  X(Matmul)                          \
  X(SpMMACompressedSize2)            \
  X(SpMMACompress2)
#define NMS_LT_OPTIONAL_FUNCTIONS(X) X(MatmulAlgSelectionDestroy)

}  // namespace nms::lt
