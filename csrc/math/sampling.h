// Sampling of points: the cell of a voxel grid that a coordinate lies in. It decides integers, so
// every operation is rounded by itself.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastzoo::math {

FASTZOO_HD float floor_of(float a) { return ::floorf(a); }
FASTZOO_HD double floor_of(double a) { return ::floor(a); }

// NaN where the coordinate is. Equal cells have equal bits: adding 0 turns -0 into 0.
template <class T>
FASTZOO_HD T cell_of(T coordinate, T start, T size) {
  return floor_of((coordinate - start) / size) + T(0);
}

// A hash of a point's cells: start from 0 and add the cell of each dimension in turn. Cells are
// small whole numbers, whose bits differ in the high ones alone, and tables are indexed by the low
// bits of the hash: hence the shifts.
FASTZOO_HD uint64_t add_to_hash(uint64_t hash, uint64_t bits) {
  hash = (hash ^ bits) * 0x9e3779b97f4a7c15u;
  return hash ^ hash >> 32;
}
FASTZOO_HD uint64_t hash_cell(uint64_t hash, float cell) {
  return add_to_hash(hash, bits_as<uint32_t>(cell));
}
FASTZOO_HD uint64_t hash_cell(uint64_t hash, double cell) {
  const uint64_t bits = bits_as<uint64_t>(cell);
  return add_to_hash(hash, bits ^ bits >> 32);
}

}  // namespace fastzoo::math
