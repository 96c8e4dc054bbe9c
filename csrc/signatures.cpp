// Linked into each library of operators; see implement() in torch_abi.h.
#include "torch_abi.h"

namespace fastzoo {

std::string& signatures() {
  static std::string lines;
  return lines;
}

}  // namespace fastzoo

extern "C" __attribute__((visibility("default"))) const char* fastzoo_signatures() {
  return fastzoo::signatures().c_str();
}
