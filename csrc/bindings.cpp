// Python module nmsparse_ext._C: host-only facts and switches. Tensors never cross pybind11; they go through the
// dispatcher (library.cpp), and importing this module is what registers those ops.

// pybind11's copy inside torch is fenced off for stable-ABI builds, although it holds nothing of libtorch.
#pragma push_macro("TORCH_TARGET_VERSION")
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#pragma pop_macro("TORCH_TARGET_VERSION")

#include <torch/headeronly/version.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "cusparselt/bindings.h"

#ifdef NMSPARSE_WITH_CUDA
#include "cuda/build_info.h"
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

// The oldest torch this binary loads into: bytes 7 and 6 of the macro are its major and minor version.
std::string torch_target() {
  constexpr uint64_t kTarget = TORCH_TARGET_VERSION;
  return std::to_string(kTarget >> 56) + "." + std::to_string((kTarget >> 48) & 0xff);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["cxx_standard"] = static_cast<long>(__cplusplus);
#ifdef __OPTIMIZE__
  info["debug"] = false;
#else
  info["debug"] = true;
#endif
  info["torch_target"] = torch_target();
  info["torch_built_with"] = TORCH_VERSION;
#ifdef NMSPARSE_WITH_CUDA
  info["cuda"] = true;
  info["cuda_version"] = nms::cuda_version();
  info["cuda_archs"] = nms::cuda_archs();
#else
  info["cuda"] = false;
  info["cuda_version"] = py::none();
  info["cuda_archs"] = std::vector<int>();
#endif
  return info;
}

void set_cpu_isa(const std::string& isa) {
  if (nms::set_cpu_isa(isa.c_str())) return;
  std::string allowed;
  for (const char* name : nms::cpu_isas()) allowed += (allowed.empty() ? "\"" : ", \"") + std::string(name) + "\"";
  throw py::value_error("set_cpu_isa: isa must be one that this CPU runs (" + allowed + "), got \"" + isa + "\"");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of nmsparse_ext; importing it registers torch.ops.nmsparse.*";
  m.def("build_info", &build_info, "What was compiled in, as a dict.");
  m.def("cpu_isa", &nms::cpu_isa, "Name of the instruction set whose kernels run.");
  m.def("cpu_isas", &nms::cpu_isas, "Names of the instruction sets that this CPU can run, slowest first.");
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("isa"), "Choose the kernels of one instruction set, process-wide.");
  nms::lt::bind(m);
}
