// Which rows of a matrix are the points of which cloud.
#pragma once

#include "launch.h"

namespace fastzoo::cuda {

// Cloud b has the rows ranges[b, 0] up to ranges[b, 1]. Ranges rise and do not overlap.
struct Clouds {
  const int64_t* ranges;
  int64_t count;
  int64_t rows;

  FASTZOO_DEVICE int64_t begin(int64_t cloud) const { return inside(ranges[2 * cloud], 0); }
  FASTZOO_DEVICE int64_t end(int64_t cloud) const {
    return inside(ranges[2 * cloud + 1], begin(cloud));
  }
  FASTZOO_DEVICE int64_t size(int64_t cloud) const { return end(cloud) - begin(cloud); }

  // The last cloud whose key(cloud), which rises, is not above `key`; -1 where there is none.
  template <class KeyOf>
  FASTZOO_DEVICE int64_t last_at(int64_t key, const KeyOf& key_of) const {
    int64_t from = 0, to = count;
    while (from < to) {
      const int64_t middle = from + (to - from) / 2;
      if (key_of(middle) <= key) {
        from = middle + 1;
      } else {
        to = middle;
      }
    }
    return from - 1;
  }
  FASTZOO_DEVICE int64_t last_from(int64_t row) const {
    return last_at(row, [&](int64_t cloud) { return begin(cloud); });
  }

  // -1 for a row of no cloud.
  FASTZOO_DEVICE int64_t of_row(int64_t row) const {
    const int64_t cloud = last_from(row);
    return cloud >= 0 && row < end(cloud) ? cloud : -1;
  }

 private:
  FASTZOO_DEVICE int64_t inside(int64_t row, int64_t least) const {
    return row < least ? least : row > rows ? rows : row;
  }
};

// `ranges` is contiguous, and outlives what it gives.
inline Clouds clouds_of(const Tensor& ranges, int64_t rows) {
  return {static_cast<const int64_t*>(ranges.const_data_ptr()), ranges.size(0), rows};
}

}  // namespace fastzoo::cuda
