#include "error.h"

namespace nms::lt {
namespace {

// The library itself names statuses only from 0.8 on.
const char* plain_name(Status status) {
  switch (status) {
    case kSuccess:
      return "CUSPARSE_STATUS_SUCCESS";
    case kNotInitialized:
      return "CUSPARSE_STATUS_NOT_INITIALIZED";
    case kAllocFailed:
      return "CUSPARSE_STATUS_ALLOC_FAILED";
    case kInvalidValue:
      return "CUSPARSE_STATUS_INVALID_VALUE";
    case kArchMismatch:
      return "CUSPARSE_STATUS_ARCH_MISMATCH";
    case kExecutionFailed:
      return "CUSPARSE_STATUS_EXECUTION_FAILED";
    case kInternalError:
      return "CUSPARSE_STATUS_INTERNAL_ERROR";
    case kNotSupported:
      return "CUSPARSE_STATUS_NOT_SUPPORTED";
    default:
      return "cusparseStatus_t";
  }
}

const char* advice(Status status) {
  switch (status) {
    case kNotInitialized:
      return "no GPU that CUDA can use, or a driver older than this library needs";
    case kAllocFailed:
      return "out of memory";
    case kInvalidValue:
      return "an argument that this version does not take";
    case kArchMismatch:
      return "the GPU is older than compute capability 8.0, or newer than this version of the library knows";
    case kInternalError:
      return "an earlier kernel may have failed (CUDA_LAUNCH_BLOCKING=1 shows where), or the library met a fault of "
             "its "
             "own";
    case kNotSupported:
      return "this version has no kernel for this combination of GPU, dtype, shape and layout";
    default:
      return "see the library's documentation";
  }
}

}  // namespace

std::string status_name(Status status) { return std::string(plain_name(status)) + " (" + std::to_string(status) + ")"; }

void check(const Api& api, Status status, const char* call, const std::string& what) {
  if (status == kSuccess) return;
  throw Error(status, "cuSPARSELt " + api.version.text() + ": cusparseLt" + call + " answered " + status_name(status) +
                          " for " + what + ": " + advice(status) +
                          ". CUSPARSELT_LOG_LEVEL=5 makes the library print its descriptors.");
}

}  // namespace nms::lt
