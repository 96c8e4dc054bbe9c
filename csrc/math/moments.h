// Mean and spread of numbers that come in parts (Chan, Golub & LeVeque, Updating formulae and a
// pairwise algorithm for computing sample variances, 1979): no sum of squares is taken from
// another.
#pragma once

#include "host_device.h"

namespace fastzoo::math {

template <class V>
struct Moments {
  V count, mean;
  V squares;  // the sum of the squared distances from the mean
};

// `share` is b's of the count of both.
template <class V>
FASTZOO_HD Moments<V> joined(const Moments<V>& a, const Moments<V>& b, V share) {
  const V distance = b.mean - a.mean;
  return {a.count + b.count, a.mean + distance * share,
          a.squares + b.squares + distance * distance * (a.count * share)};
}
template <class V>
FASTZOO_HD Moments<V> joined(const Moments<V>& a, const Moments<V>& b) {
  if (b.count == V(0)) return a;
  return joined(a, b, b.count / (a.count + b.count));
}

// With one less than the count in the denominator.
FASTZOO_HD double deviation(const Moments<double>& all) {
  return square_root(all.squares / (all.count - 1));
}

}  // namespace fastzoo::math
