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

template <class V>
FASTZOO_HD Moments<V> joined(const Moments<V>& a, const Moments<V>& b) {
  if (b.count == V(0)) return a;
  const V count = a.count + b.count, share = b.count / count, distance = b.mean - a.mean;
  return {count, a.mean + distance * share,
          a.squares + b.squares + distance * distance * (a.count * share)};
}

// With one less than the count in the denominator.
FASTZOO_HD double deviation(const Moments<double>& all) {
  return square_root(all.squares / (all.count - 1));
}

}  // namespace fastzoo::math
