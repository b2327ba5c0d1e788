#include "loader.h"

#include <dlfcn.h>

namespace nms::lt {
namespace {

// Symbols of one opened library. `missing` collects the names of required functions that it lacks.
class Symbols {
 public:
  explicit Symbols(void* library) : library_(library) {}

  template <class Function>
  void find(Function& function, const std::string& name, bool required) {
    // Through void*: POSIX promises that object and function pointers are one size.
    function = reinterpret_cast<Function>(dlsym(library_, ("cusparseLt" + name).c_str()));
    if (function == nullptr && required) missing += (missing.empty() ? "cusparseLt" : ", cusparseLt") + name;
  }

  std::string missing;

 private:
  void* library_;
};

// Versions whose header was read; another one may have other numbers and other signatures.
bool is_known(Version v) { return v.major == 0 && v.minor >= 6 && v.minor <= 10; }

// Why this library will not do; empty when `api` is filled.
std::string fill(void* library, Api& api) {
  Symbols symbols(library);
#define NMS_LT_FIND_REQUIRED(name) symbols.find(api.name, #name, true);
#define NMS_LT_FIND_OPTIONAL(name) symbols.find(api.name, #name, false);
  NMS_LT_REQUIRED_FUNCTIONS(NMS_LT_FIND_REQUIRED)
  NMS_LT_OPTIONAL_FUNCTIONS(NMS_LT_FIND_OPTIONAL)
#undef NMS_LT_FIND_REQUIRED
#undef NMS_LT_FIND_OPTIONAL
  if (!symbols.missing.empty()) return "it lacks " + symbols.missing;
  // GetVersion wants a handle, hence a GPU; properties do not. Their numbers: 0 major, 1 minor, 2 patch.
  if (api.GetProperty(0, &api.version.major) != kSuccess || api.GetProperty(1, &api.version.minor) != kSuccess ||
      api.GetProperty(2, &api.version.patch) != kSuccess)
    return "it does not tell its version";
  if (!is_known(api.version)) return "version " + api.version.text() + " is not one of 0.6 to 0.10";
  if (api.version.minor >= 8 && api.MatmulAlgSelectionDestroy == nullptr)
    return "version " + api.version.text() + " lacks cusparseLtMatmulAlgSelectionDestroy";
  return "";
}

}  // namespace

Loaded load(const std::vector<std::string>& paths) {
  std::string reason;
  for (const std::string& path : paths) {
    std::string why;
    if (void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) {
      auto api = std::make_unique<Api>();
      api->path = path;
      why = fill(library, *api);
      if (why.empty()) return {std::move(api), ""};
      dlclose(library);
    } else {
      why = dlerror();
    }
    reason += (reason.empty() ? "" : "; ") + path + ": " + why;
  }
  return {nullptr, reason.empty() ? "nowhere to look for it" : "no usable cuSPARSELt (" + reason + ")"};
}

}  // namespace nms::lt
