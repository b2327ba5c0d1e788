// cuSPARSELt's part of the Python module: what is loaded, sizes, counts. No tensors.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "process.h"

namespace nms::lt {

inline DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  if (name == "int8") return DType::kInt8;
  if (name == "float8_e4m3fn") return DType::kFloat8E4M3;
  throw pybind11::value_error("cuSPARSELt multiplies float32, bfloat16, float16, int8 and float8_e4m3fn, got " + name);
}

inline OutType out_named(const std::string& name) {
  if (name == "int32") return OutType::kInt32;
  switch (dtype_named(name)) {
    case DType::kFloat32:
      return OutType::kFloat32;
    case DType::kBFloat16:
      return OutType::kBFloat16;
    case DType::kInt8:
      return OutType::kInt8;
    case DType::kFloat8E4M3:
      return OutType::kFloat8E4M3;
    default:
      return OutType::kFloat16;
  }
}

inline Problem weight_problem(int64_t rows, int64_t k, int64_t batches, const std::string& dtype) {
  Problem problem;
  problem.rows = rows, problem.k = k, problem.batches = batches, problem.type = dtype_named(dtype);
  return problem;
}

inline pybind11::dict as_dict(const DeviceStatistics& s) {
  pybind11::dict d;
  d["device"] = s.device, d["plans"] = s.plans, d["hits"] = s.hits, d["misses"] = s.misses;
  d["evictions"] = s.evictions, d["streams"] = s.streams, d["workspace_bytes"] = s.workspace_bytes;
  d["bias_copies"] = s.bias_copies;
  return d;
}

inline void bind(pybind11::module_& m) {
  namespace py = pybind11;
  m.def(
      "cusparselt_open",
      [](const std::vector<std::string>& paths) {
        const Opened opened = open(paths);
        py::dict info;
        info["version"] = opened.loaded ? py::object(py::str(opened.version.text())) : py::none();
        info["path"] = opened.loaded ? py::object(py::str(opened.path)) : py::none();
        info["reason"] = opened.reason;
        return info;
      },
      py::arg("paths"), "Load cuSPARSELt from the first of these files that will do, unless one is loaded already.");
  m.def(
      "cusparselt_compressed_bytes",
      [](int device, int64_t rows, int64_t k, int64_t batches, const std::string& dtype) {
        return engine().compressed_bytes(device, weight_problem(rows, k, batches, dtype));
      },
      py::arg("device"), py::arg("rows"), py::arg("k"), py::arg("batches"), py::arg("dtype"),
      "Bytes of a compressed weight. `device` must be the current one.");
  m.def(
      "cusparselt_algorithms",
      [](int device, int64_t rows, int64_t k, int64_t batches, int64_t tokens, const std::string& dtype,
         const std::string& out_dtype) {
        Problem problem = weight_problem(rows, k, batches, dtype);
        problem.tokens = tokens, problem.x_ld = k, problem.out = out_named(out_dtype);
        problem.x_batch_stride = batches > 1 ? tokens * k : 0;
        return engine().algorithms(device, problem);
      },
      py::arg("device"), py::arg("rows"), py::arg("k"), py::arg("batches"), py::arg("tokens"), py::arg("dtype"),
      py::arg("out_dtype"), "How many algorithm ids there are for a product. `device` must be the current one.");
  m.def(
      "cusparselt_statistics",
      [] {
        std::vector<py::dict> all;
        if (Engine* ready = engine_if_any())
          for (const DeviceStatistics& s : ready->statistics()) all.push_back(as_dict(s));
        return all;
      },
      "Plans, hits, misses, evictions, workspaces and copied biases, a dict for each device that was used.");
  m.def(
      "cusparselt_clear",
      [](int device) {
        if (Engine* ready = engine_if_any()) ready->clear(device);
      },
      py::arg("device"), "Destroy a device's plans, workspaces and handle. It must be the current one, and idle.");
  m.def(
      "cusparselt_set_plan_limit", [](size_t limit) { engine().set_plan_limit(limit); }, py::arg("limit"),
      "How many plans a device keeps.");
}

}  // namespace nms::lt
