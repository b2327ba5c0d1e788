// What the CUDA half was compiled with, as the CUDA compiler itself says.
#pragma once

#include <string>
#include <vector>

namespace nms {

std::string cuda_version();     // "13.0"
std::vector<int> cuda_archs();  // architectures with machine code in this binary: {80, 90}

}  // namespace nms
