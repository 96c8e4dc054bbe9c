// The weight net of PointConv: from the coordinates of an edge to its M weights. Its parameters lie
// in one array: of each layer the weight [out][in], then the bias [out].
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastzoo::math {

constexpr int kNetLayers = 8;  // at most
constexpr int kNetWidth = 64;  // of a layer, at most

struct NetLayer {
  int in, out;
  int64_t weight, bias;  // where they begin
};

struct NetLayout {
  int dims;    // of the coordinates
  int layers;  // without any, the coordinates themselves are the weights
  int width;   // M
  int64_t size;
  NetLayer layer[kNetLayers];
};

// False where the net has too many layers, or a layer too many outputs or none. Host only.
static inline bool net_layout(int64_t dims, const int64_t* widths, int64_t layers,
                              NetLayout& layout) {
  if (dims < 1 || dims > (int64_t{1} << 20) || layers > kNetLayers) return false;
  layout = {};
  layout.dims = layout.width = static_cast<int>(dims);
  layout.layers = static_cast<int>(layers);
  for (int64_t i = 0; i < layers; ++i) {
    if (widths[i] < 1 || widths[i] > kNetWidth) return false;
    const int in = layout.width, out = static_cast<int>(widths[i]);
    const int64_t bias = layout.size + static_cast<int64_t>(in) * out;
    layout.layer[i] = {in, out, layout.size, bias};
    layout.size = bias + out;
    layout.width = out;
  }
  return true;
}

// Layer by layer, V being a number or the CPU's vector of numbers, one an edge. T is that of the
// parameters.

// out[o] = relu(bias[o] + sum of weight[o][i] in[i]), the sum in ascending i.
template <class T, class V>
FASTZOO_HD void net_layer(const NetLayer& layer, const T* net, const V* in, V* out) {
  const T* weight = net + layer.weight;
  for (int o = 0; o < layer.out; ++o) {
    V sum(net[layer.bias + o]);
    for (int i = 0; i < layer.in; ++i) sum = fused_multiply_add(V(weight[i]), in[i], sum);
    out[o] = maximum(sum, V(T(0)));
    weight += layer.in;
  }
}

// The gradient by what enters the ReLU, from that by its output `out`.
template <class T, class V>
FASTZOO_HD V relu_gradient(V out, V grad) {
  return select_greater(out, V(T(0)), grad, V(T(0)));
}

// grad_in[i] = sum of weight[o][i] grad[o], the sum in ascending o. `grad` is by what enters the
// ReLU.
template <class T, class V>
FASTZOO_HD void net_layer_backward(const NetLayer& layer, const T* net, const V* grad, V* grad_in) {
  const T* const weight = net + layer.weight;
  for (int i = 0; i < layer.in; ++i) {
    V sum(T(0));
    for (int o = 0; o < layer.out; ++o) {
      sum = fused_multiply_add(V(weight[o * layer.in + i]), grad[o], sum);
    }
    grad_in[i] = sum;
  }
}

}  // namespace fastzoo::math
