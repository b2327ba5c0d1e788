#include "build_info.h"

namespace nms {

std::string cuda_version() { return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__); }

std::vector<int> cuda_archs() {
  std::vector<int> archs;
  for (const int arch : {__CUDA_ARCH_LIST__}) archs.push_back(arch / 10);  // nvcc lists 800,900
  return archs;
}

}  // namespace nms
