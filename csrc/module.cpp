// fastzoo._C: what this build is made of. The operators live in _C_cpu.so and _C_cuda.so.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict facts() {
  py::dict result;
  result["version"] = FASTZOO_VERSION;
  result["compiler"] = FASTZOO_COMPILER;
  result["torch"] = "built with " FASTZOO_TORCH_VERSION ", runs with 2.10 or newer";
  result["cpu"] = FASTZOO_CPU_CAPABILITIES;
  result["cuda"] = FASTZOO_CUDA_VERSION;
  result["cuda_archs"] = FASTZOO_CUDA_ARCHS;
  return result;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "What this build of fastzoo is made of.";
  m.def("facts", &facts, "Versions, compilers and architectures of this build, as strings.");
}
