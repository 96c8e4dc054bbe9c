// The part of the libtorch stable ABI that operator entries use.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace fastzoo {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;
using ScalarType = torch::headeronly::ScalarType;
using Tensor = torch::stable::Tensor;

// One line a registered kernel, as its C++ function is declared: the stable ABI does not compare
// that with the schema, so a test does.
std::string& signatures();

template <class T>
std::string schema_type();
template <>
inline std::string schema_type<Tensor>() {
  return "Tensor";
}
template <>
inline std::string schema_type<double>() {
  return "float";
}
template <>
inline std::string schema_type<int64_t>() {
  return "int";
}
template <>
inline std::string schema_type<bool>() {
  return "bool";
}
template <>
inline std::string schema_type<std::string>() {
  return "str";
}
template <>
inline std::string schema_type<std::vector<int64_t>>() {
  return "List[int]";
}

template <class T>
struct ReturnTypes {
  static std::string list() { return schema_type<T>(); }
};
template <class... T>
struct ReturnTypes<std::tuple<T...>> {
  static std::string list() { return ((schema_type<T>() + " ") + ...); }
};

template <class Return, class... Arguments>
std::string signature(Return (*)(Arguments...)) {
  return ((schema_type<std::decay_t<Arguments>>() + " ") + ...) + "-> " +
         ReturnTypes<Return>::list();
}

// Registers a kernel, for one overload: implement<nms>(m, "nms.cpu").
template <auto* kKernel>
void implement(torch::stable::detail::StableLibrary& library, const char* name) {
  signatures() += std::string(name) + ": " + signature(kKernel) + "\n";
  library.impl(name, TORCH_BOX(kKernel));
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// The dtype that an operator computes in and returns floats as.
inline ScalarType compute_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls body(T{}) with the C++ type of a floating dtype.
template <class Body>
void dispatch_float(ScalarType dtype, const char* op, const Body& body) {
  switch (dtype) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::Half:
      return body(Half{});
    case ScalarType::BFloat16:
      return body(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": floating dtype float, double, half or bfloat16 needed");
  }
}

}  // namespace fastzoo
