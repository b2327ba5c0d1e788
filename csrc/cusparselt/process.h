// The one cuSPARSELt of this process, with memory from torch's allocators. Ops and bindings meet here.
#pragma once

#include <string>
#include <vector>

#include "library/engine.h"
#include "library/loader.h"

namespace nms::lt {

struct Opened {
  bool loaded = false;
  Version version;     // of what is loaded,
  std::string path;    // and where it was found
  std::string reason;  // why nothing is
};

// Loads the library if none is loaded yet; without paths from where torch's own lies.
Opened open(const std::vector<std::string>& paths = {});

// What of CUDA's runtime the engine calls. Set by ops.cu, which a CPU build leaves out: nothing is multiplied there.
struct StreamCalls {
  void (*copy)(void* stream, void* to, const void* from, size_t bytes) = nullptr;
  bool (*is_capturing)(void* stream) = nullptr;
};
void set_stream_calls(const StreamCalls& calls);

// The engine of the loaded library. Opens it if need be; throws std::runtime_error with the reason when there is none.
Engine& engine();

// The engine if there is one already.
Engine* engine_if_any();

}  // namespace nms::lt
