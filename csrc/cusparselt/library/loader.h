// Finds cuSPARSELt at run time. Nothing links against it: a machine without it loses this engine and nothing else.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "api.h"

namespace nms::lt {

struct Loaded {
  std::unique_ptr<const Api> api;  // null: there is none, and `reason` says why
  std::string reason;
};

// The first of `paths` that loads, exports what api.h names and has a version between 0.6 and 0.10. Paths are file
// names, or the bare name "libcusparseLt.so.0", which is what this process has loaded already or else what the system's
// loader finds.
// A library once loaded stays loaded: plans and CUDA graphs hold addresses inside it.
Loaded load(const std::vector<std::string>& paths);

}  // namespace nms::lt
