// The counter's words and normals of a tile of rows. Included like vec.h.
#pragma once

#include "words.h"

namespace fastzoo::cpu::FASTZOO_CPU_ISA {

// Blocks that are made at a time, and their elements.
constexpr int kBlocksAtOnce = Words::size;
constexpr int kRandomAtOnce = kBlocksAtOnce * math::kWordsOfBlock;

// Four rows of lanes are turned within pieces of four lanes, so that these are the block of a lane
// and the lane of a block where the elements shall come out in order.
FASTZOO_INLINE constexpr int block_of_lane(int lane) {
  return lane % 4 * (kBlocksAtOnce / 4) + lane / 4;
}
FASTZOO_INLINE constexpr int lane_of_block(int block) {
  return block % (kBlocksAtOnce / 4) * 4 + block / (kBlocksAtOnce / 4);
}

// What distinguishes a block, for each of the lanes.
struct Counters {
  // 64-bit lanes, the even ones before the odd ones.
  struct Lanes {
    uint64_t words[kBlocksAtOnce];

    __attribute__((always_inline)) void set(int lane, uint64_t word) {
      words[lane % 2 * (kBlocksAtOnce / 2) + lane / 2] = word;
    }
    __attribute__((always_inline)) WideWords wide() const {
      WideWords wide;
      __builtin_memcpy(&wide.even, words, sizeof(wide.even));
      __builtin_memcpy(&wide.odd, words + kBlocksAtOnce / 2, sizeof(wide.odd));
      return wide;
    }
  };

  WideWords block, draw, sample, seed_low, seed_high;

  // Of blocks `first` and following of one row.
  __attribute__((always_inline)) Counters(const math::RandomKey& key, uint32_t draw, uint64_t first)
      : draw(draw), sample(key.sample), seed_low(key.seed_low), seed_high(key.seed_high) {
    Lanes blocks;
    for (int lane = 0; lane < kBlocksAtOnce; ++lane) blocks.set(lane, first + block_of_lane(lane));
    block = blocks.wide();
  }
  __attribute__((always_inline)) Counters(const Lanes& block, const Lanes& draw,
                                          const Lanes& sample, const Lanes& seed_low,
                                          const Lanes& seed_high)
      : block(block.wide()),
        draw(draw.wide()),
        sample(sample.wide()),
        seed_low(seed_low.wide()),
        seed_high(seed_high.wide()) {}

  __attribute__((always_inline)) void advance() {
    block.even += kBlocksAtOnce;
    block.odd += kBlocksAtOnce;
  }

  __attribute__((always_inline)) math::RandomBlock<Words> words() const {
    const math::RandomBlock<WideWords> wide = math::philox(
        block, WideWords(block.even >> 32, block.odd >> 32), draw, sample, seed_low, seed_high);
    return {{wide.words[0].narrow(), wide.words[1].narrow(), wide.words[2].narrow(),
             wide.words[3].narrow()}};
  }
};

// Writes kRandomAtOnce of them.
FASTZOO_INLINE void put_random(const Counters& counters, float* normals) {
  Vec<float> rows[math::kWordsOfBlock];
  math::normals_of(counters.words(), rows);
  transpose(rows);
  for (int i = 0; i < math::kWordsOfBlock; ++i) rows[i].store(normals + i * Words::size);
}
FASTZOO_INLINE void put_random(const Counters& counters, uint32_t* words) {
  const math::RandomBlock<Words> block = counters.words();
  Vec<float> rows[math::kWordsOfBlock];
  for (int i = 0; i < math::kWordsOfBlock; ++i) rows[i] = float_of_bits(block.words[i]);
  transpose(rows);
  for (int i = 0; i < math::kWordsOfBlock; ++i) bits_of(rows[i]).store(words + i * Words::size);
}

// The words, or the normals, of elements [begin, begin + count) of one row; begin is a multiple of
// 4. `to` has room for kRandomAtOnce more.
template <class Number>
__attribute__((noinline)) void random_of_row(const int64_t* key, uint32_t draw, int64_t begin,
                                             int64_t count, Number* to) {
  const uint64_t first = static_cast<uint64_t>(begin) / math::kWordsOfBlock;
  Counters counters(math::random_key(key), draw, first);
  for (int64_t i = 0; i < count; i += kRandomAtOnce) {
    put_random(counters, to + i);
    counters.advance();
  }
}

// Those of all `width` elements of each of the rows, one row behind the other, where draw(row) is a
// row's draw. `keys` are those of the rows. `to` has room for kRandomAtOnce more.
template <class Number, class Draw>
__attribute__((noinline)) void random_of_rows(const int64_t* keys, const Draw& draw, int64_t rows,
                                              int64_t width, Number* to) {
  constexpr int kFew = math::kWordsOfBlock;
  const int64_t row_blocks = (width + kFew - 1) / kFew;
  int64_t row = 0, block = 0;
  Counters::Lanes blocks{}, draws{}, samples{}, seeds_low{}, seeds_high{};
  while (row < rows) {
    int64_t offsets[kBlocksAtOnce];
    int used = 0;
    for (; used < kBlocksAtOnce && row < rows; ++used) {
      const math::RandomKey key = math::random_key(keys + 2 * row);
      const int lane = lane_of_block(used);
      blocks.set(lane, static_cast<uint64_t>(block));
      draws.set(lane, draw(row));
      samples.set(lane, key.sample);
      seeds_low.set(lane, key.seed_low);
      seeds_high.set(lane, key.seed_high);
      offsets[used] = row * width + block * kFew;
      if (++block == row_blocks) {
        block = 0;
        ++row;
      }
    }
    Number numbers[kRandomAtOnce];
    put_random(Counters(blocks, draws, samples, seeds_low, seeds_high), numbers);
    // Whole blocks are written: the next writes over what is beyond its row.
    for (int i = 0; i < used; ++i) {
      __builtin_memcpy(to + offsets[i], numbers + i * kFew, kFew * sizeof(Number));
    }
  }
}

}  // namespace fastzoo::cpu::FASTZOO_CPU_ISA
