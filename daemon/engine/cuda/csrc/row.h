// Samples the token of one row by a team of threads: maximum, cutoff, sampling (daemon/engine/sampling/sampler.py).
//
// The team is one or more blocks of threads. Each block has a slice of the row's tokens and a `Shared`, which the other
// blocks can read. Results are merged only by maximum and by integer sums, so they do not depend on the team. All code
// here runs in every thread. A `Team` has:
//
//   thread(), threads()      index in the block, and number of threads
//   block(), blocks()        index in the team, and number of blocks
//   own(), shared(b)         the Shared of this block, of block b
//   sync(), sync_all()       barrier of the block, of the team; both make writes visible
//   add(word, amount)        atomic add, on a word of its own block
//   warp(), warps()          index of the thread's warp in the block, and number of warps
//   leads_warp()             true in the first thread of a warp
//   warp_max(x)              the largest x of the warp, uint32 or uint64; all its threads must call it
#pragma once

#include "draw.h"

namespace llumd {

struct RowParams {
  float inverse_temperature;  // 0: greedy
  float min_p_depth;          // temperature * log(min_p), -inf for none
  int32_t top_k;              // 0, or at least the vocabulary size, for all
  double top_p;               // 1 for all
  uint64_t seed;
  uint32_t position;
};

// ---- A block's tokens

struct alignas(16) Group {
  float logit[GROUP];
};

// `count` tokens from id `first` on, a multiple of GROUP. A thread handles every threads()-th group, always the same
// ones, so it may read its own writes without a barrier.
struct Slice {
  const float* logits;
  uint32_t first;
  uint32_t count;
  bool aligned;  // to the alignment of Group

  LLUMD_BOTH uint32_t groups() const { return (count + GROUP - 1) / GROUP; }

  // Tokens past the end are -inf.
  LLUMD_BOTH Group group(uint32_t g) const {
    const uint32_t start = g * GROUP;
    if (aligned && start + GROUP <= count) return *reinterpret_cast<const Group*>(logits + start);
    Group group;
    for (uint32_t j = 0; j < GROUP; ++j) group.logit[j] = start + j < count ? logits[start + j] : float_of_bits(0xFF800000u);
    return group;
  }
};

// Tokens of each block except the last ones.
LLUMD_BOTH uint32_t slice_length(uint32_t vocab, uint32_t blocks) {
  return ((vocab + blocks - 1) / blocks + GROUP - 1) / GROUP * GROUP;
}

LLUMD_BOTH Slice slice_of(const float* row, uint32_t vocab, uint32_t block, uint32_t blocks) {
  const uint32_t length = slice_length(vocab, blocks);
  const uint32_t first = block * length < vocab ? block * length : vocab;
  const uint32_t count = vocab - first < length ? vocab - first : length;
  const bool aligned = reinterpret_cast<uintptr_t>(row + first) % alignof(Group) == 0;
  return {row + first, first, count, aligned};
}

// ---- Bins: sums of amounts below 2^42, in three parts of 14 bits, so that 32-bit atomics suffice

constexpr uint32_t PARTS = 3;
constexpr uint32_t PART_BITS = 14;
constexpr uint32_t BINS = 2048;
constexpr uint32_t MIDDLE = 8;               // bins that one middle sum covers
constexpr uint32_t MIDDLES = BINS / MIDDLE;  // 256
constexpr uint32_t TOP = 16;                 // middle sums that one top sum covers
constexpr uint32_t TOPS = MIDDLES / TOP;     // 16
constexpr uint32_t MAX_SLICE = 1u << (32 - PART_BITS);  // more tokens could overflow a part
constexpr uint32_t MAX_WARPS = 32;

struct Shared {
  uint32_t bins[PARTS][BINS];  // of this block's tokens
  uint64_t middles[MIDDLES];   // of this block's tokens
  uint64_t merged[MIDDLES];    // of all blocks' tokens; also the next two
  uint64_t tops[TOPS];
  uint64_t leaves[MIDDLE];
  uint64_t warp_max[MAX_WARPS];
  uint64_t block_max[2];
};

LLUMD_BOTH uint64_t bin_amount(const Shared& shared, uint32_t bin) {
  return shared.bins[0][bin] + (static_cast<uint64_t>(shared.bins[1][bin]) << PART_BITS) +
         (static_cast<uint64_t>(shared.bins[2][bin]) << (2 * PART_BITS));
}

template <class Team>
LLUMD_BOTH void clear_bins(Team& team) {
  team.sync_all();  // until no other block reads them
  Shared& own = team.own();
  for (uint32_t part = 0; part < PARTS; ++part)
    for (uint32_t bin = team.thread(); bin < BINS; bin += team.threads()) own.bins[part][bin] = 0;
  team.sync();
}

template <class Team>
LLUMD_BOTH void add_to_bin(Team& team, uint32_t bin, uint64_t amount) {
  Shared& own = team.own();
  for (uint32_t part = 0; part < PARTS; ++part) {
    const uint32_t piece = static_cast<uint32_t>(amount >> (part * PART_BITS)) & ((1u << PART_BITS) - 1);
    if (piece) team.add(&own.bins[part][bin], piece);
  }
}

// Sums up all blocks' bins for `find_bin`, and returns the total.
template <class Team>
LLUMD_BOTH uint64_t merge_bins(Team& team) {
  Shared& own = team.own();
  team.sync();
  for (uint32_t m = team.thread(); m < MIDDLES; m += team.threads()) {
    uint64_t sum = 0;
    for (uint32_t j = 0; j < MIDDLE; ++j) sum += bin_amount(own, m * MIDDLE + j);
    own.middles[m] = sum;
  }
  team.sync_all();
  for (uint32_t m = team.thread(); m < MIDDLES; m += team.threads()) {
    uint64_t sum = 0;
    for (uint32_t b = 0; b < team.blocks(); ++b) sum += team.shared(b).middles[m];
    own.merged[m] = sum;
  }
  team.sync();
  for (uint32_t t = team.thread(); t < TOPS; t += team.threads()) {
    uint64_t sum = 0;
    for (uint32_t j = 0; j < TOP; ++j) sum += own.merged[t * TOP + j];
    own.tops[t] = sum;
  }
  team.sync();
  uint64_t total = 0;
  for (uint32_t t = 0; t < TOPS; ++t) total += own.tops[t];
  return total;
}

// Adds up n amounts from the last one down, and returns the index at which the sum reaches `target`. Subtracts the
// amounts above that index from `target`. The sum of all amounts must reach it.
LLUMD_BOTH uint32_t reach(const uint64_t* amounts, uint32_t n, uint64_t& target) {
  uint32_t i = n - 1;
  for (; i > 0 && amounts[i] < target; --i) target -= amounts[i];
  return i;
}

struct Place {
  uint32_t bin;
  uint64_t amount;  // in the bin
};

// Returns the bin in which the sum from the highest bin down reaches `target`. Subtracts the bins above it from
// `target`.
template <class Team>
LLUMD_BOTH Place find_bin(Team& team, uint64_t& target) {
  Shared& own = team.own();
  const uint32_t top = reach(own.tops, TOPS, target);
  const uint32_t middle = top * TOP + reach(own.merged + top * TOP, TOP, target);
  for (uint32_t j = team.thread(); j < MIDDLE; j += team.threads()) {
    uint64_t sum = 0;
    for (uint32_t b = 0; b < team.blocks(); ++b) sum += bin_amount(team.shared(b), middle * MIDDLE + j);
    own.leaves[j] = sum;
  }
  team.sync();
  const uint32_t leaf = reach(own.leaves, MIDDLE, target);
  return {middle * MIDDLE + leaf, own.leaves[leaf]};
}

// ---- The cutoff

struct Counting {  // top-k
  uint32_t k;

  LLUMD_BOTH uint64_t amount(float) const { return 1; }
  LLUMD_BOTH uint64_t target(uint64_t) const { return k; }
};

struct Weighing {  // top-p
  Scale scale;
  double top_p;

  LLUMD_BOTH uint64_t amount(float logit) const { return static_cast<uint64_t>(scale.weight_of(logit)); }
  LLUMD_BOTH uint64_t target(uint64_t total) const {
    return static_cast<uint64_t>(nucleus_target(static_cast<int64_t>(total), top_p));
  }
};

// Adds the amount of each token with key >= last, and with `prefix` as the bits of its key from `top` up, to the bin of
// its key's bits [bottom, top).
template <class Team, class Measure>
LLUMD_BOTH void fill_bins(Team& team, const Slice& slice, uint64_t last, uint64_t prefix, uint32_t top, uint32_t bottom,
                          const Measure& measure) {
  clear_bins(team);
  const uint32_t bits = top - bottom;
  for (uint32_t g = team.thread(); g < slice.groups(); g += team.threads()) {
    const Group group = slice.group(g);
    for (uint32_t j = 0; j < GROUP; ++j) {
      const uint64_t key = key_of(group.logit[j], slice.first + g * GROUP + j);
      const uint64_t digits = key >> bottom;
      if (key >= last && digits >> bits == prefix)
        add_to_bin(team, static_cast<uint32_t>(digits & ((1u << bits) - 1)), measure.amount(group.logit[j]));
    }
  }
}

// Keys are read from the top in digits of 11, 11, 10 bits (of the logit) and 10, 11, 11 bits (of the token).
LLUMD_BOTH uint32_t digit_below(uint32_t top) { return top == 42 || top == 32 ? top - 10 : top - 11; }

// Selects, of the tokens with key >= last, the shortest prefix whose amounts reach the measure's target, or all of
// them. Returns a key that separates it: exactly the tokens of the prefix have at least this key.
template <class Team, class Measure>
LLUMD_BOTH uint64_t select(Team& team, const Slice& slice, uint64_t last, const Measure& measure) {
  uint64_t prefix = 0, target = 0;
  for (uint32_t top = 64; top > 0;) {
    const uint32_t bottom = digit_below(top);
    fill_bins(team, slice, last, prefix, top, bottom, measure);
    const uint64_t total = merge_bins(team);
    if (top == 64) {
      target = measure.target(total);
      if (total < target) return last;
    }
    const Place place = find_bin(team, target);
    prefix = prefix << (top - bottom) | place.bin;
    top = bottom;
    if (top == 32) {  // the remaining tokens have equal logits: often it is one, and all of them stay
      const uint64_t least = prefix << 32;
      if (target > place.amount - measure.amount(value_of(least))) return least > last ? least : last;
    }
  }
  return prefix;
}

// Returns a key: the candidates are the tokens with at least this key.
template <class Team>
LLUMD_BOTH uint64_t find_cutoff(Team& team, const Slice& slice, const Scale& scale, const RowParams& params,
                                uint32_t vocab) {
  const float least = scale.largest + params.min_p_depth;
  uint64_t last = least_key(least > -MAX_FLOAT ? least : -MAX_FLOAT);
  if (params.top_k > 0 && static_cast<uint32_t>(params.top_k) < vocab)
    last = select(team, slice, last, Counting{static_cast<uint32_t>(params.top_k)});
  if (params.top_p < 1.0) last = select(team, slice, last, Weighing{scale, params.top_p});
  return last;
}

// ---- Sampling

// Returns the largest of all threads' keys. Consecutive calls must use different values of `slot`.
template <class Team>
LLUMD_BOTH uint64_t largest_of_team(Team& team, uint64_t key, uint32_t slot) {
  Shared& own = team.own();
  key = team.warp_max(key);
  if (team.leads_warp()) own.warp_max[team.warp()] = key;
  team.sync();
  if (team.thread() == 0) {
    for (uint32_t w = 1; w < team.warps(); ++w) key = own.warp_max[w] > key ? own.warp_max[w] : key;
    own.block_max[slot] = key;
  }
  team.sync_all();
  for (uint32_t b = 0; b < team.blocks(); ++b) {
    const uint64_t other = team.shared(b).block_max[slot];
    key = other > key ? other : key;
  }
  return key;
}

// Returns the key of the largest logit.
template <class Team>
LLUMD_BOTH uint64_t find_largest(Team& team, const Slice& slice) {
  uint64_t first = 0;
  for (uint32_t g = team.thread(); g < slice.groups(); g += team.threads()) {
    const Group group = slice.group(g);
    for (uint32_t j = 0; j < GROUP; ++j) {
      const uint64_t key = key_of(group.logit[j], slice.first + g * GROUP + j);
      first = key > first ? key : first;
    }
  }
  return largest_of_team(team, first, 0);
}

// Computes the scores of one group's candidates; skips candidates that cannot beat `bound`. Updates `winner`, a key of
// score and token, if one of them is better.
LLUMD_BOTH void score_group(const Group& group, uint32_t token, uint64_t last, const Scale& scale,
                            const RowParams& params, float bound, uint64_t& winner) {
  float high = float_of_bits(0xFF800000u);
  for (uint32_t j = 0; j < GROUP; ++j) high = group.logit[j] > high ? group.logit[j] : high;
  const float gap = bound - scale.scaled(high);
  if (gap > MAX_NOISE + MARGIN) return;
  const uint32_t limit = largest_word(gap);
  const Words words = philox(params.position, token / GROUP, STREAM_DRAW, params.seed);
  for (uint32_t j = 0; j < GROUP; ++j) {
    if (words.lane[j] > limit || key_of(group.logit[j], token + j) < last) continue;
    const uint64_t score = key_of(scale.scaled(group.logit[j]) + gumbel(words.lane[j]), token + j);
    winner = score > winner ? score : winner;
  }
}

// Returns the token with the largest score. `best`: the token with the largest logit. A warp shares its bound, so that
// the noise of only a few tokens is computed.
template <class Team>
LLUMD_BOTH uint32_t draw(Team& team, const Slice& slice, const Scale& scale, const RowParams& params, uint32_t best,
                         uint64_t last) {
  uint64_t winner = key_of(gumbel(word_of(params.position, best, STREAM_DRAW, params.seed)), best);
  for (uint32_t start = 0; start < slice.groups(); start += team.threads()) {
    const float bound = float_of_order(team.warp_max(static_cast<uint32_t>(winner >> 32)));
    const uint32_t g = start + team.thread();
    if (g < slice.groups())
      score_group(slice.group(g), slice.first + g * GROUP, last, scale, params, bound, winner);
  }
  return token_of(largest_of_team(team, winner, 1));
}

// Returns the row's token in every thread, or NO_TOKEN if no logit is above -inf.
template <class Team>
LLUMD_BOTH int32_t draw_row(Team& team, const Slice& slice, const RowParams& params, uint32_t vocab) {
  const uint64_t first = find_largest(team, slice);
  if (first < least_key(-MAX_FLOAT)) return NO_TOKEN;
  const uint32_t best = token_of(first);
  if (params.inverse_temperature == 0.0f) return static_cast<int32_t>(best);
  const float largest = value_of(first);
  const Scale scale{largest > MAX_FLOAT ? MAX_FLOAT : largest, params.inverse_temperature};
  const uint64_t last = find_cutoff(team, slice, scale, params, vocab);
  return static_cast<int32_t>(draw(team, slice, scale, params, best, last));
}

}  // namespace llumd
