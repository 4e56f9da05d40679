// Prepares a step's queries, keys and values for attention: queries are rotated in place, keys are rotated and written
// to the pages, values are written to the pages unchanged. A piece of the work is eight columns of one half of a head
// and their eight partners in the other half. Pieces are independent.
//
// Rotated numbers are rounded to bfloat16 before they become e4m3, as if these were separate operations. Build with
// -fmad=false (nvcc) or -ffp-contract=off: then the results equal torch's to the last bit.
#pragma once

#include "pages.h"

namespace llumd {

// Tokens `stride` entries apart, each with contiguous heads.
struct Tokens {
  Bf16* x;
  int64_t stride;

  LLUMD_BOTH Eight* at(uint32_t token, uint32_t column) const {
    return reinterpret_cast<Eight*>(x + token * stride + column);
  }
};

template <class Entry>
struct Append {
  Tokens q, k, v;
  Entry* keys;
  Entry* values;
  Pages pages;
  const int32_t* rows;  // the sequence of each token
  const int32_t* positions;
  const float* angles;  // [max_len, 2 half]: cosines, then sines
  uint32_t tokens, heads, kv_heads;
  uint32_t half;  // of a head's width, a multiple of EIGHT

  LLUMD_BOTH uint32_t pieces_of_head() const { return half / EIGHT; }
  LLUMD_BOTH uint32_t pieces_of_token() const { return (heads + 2 * kv_heads) * pieces_of_head(); }
};

struct Rotation {
  float cosine[EIGHT];
  float sine[EIGHT];
};

LLUMD_BOTH Rotation rotation_of(const float* angles, uint32_t half) {
  Rotation rotation;
  LLUMD_UNROLL
  for (uint32_t j = 0; j < EIGHT; ++j) {
    rotation.cosine[j] = angles[j];
    rotation.sine[j] = angles[half + j];
  }
  return rotation;
}

LLUMD_BOTH uint32_t pair_of(float even, float odd) { return to_bf16(even) | static_cast<uint32_t>(to_bf16(odd)) << 16; }

// Rotates eight columns `low` and their partners `high`.
LLUMD_BOTH void rotate(Eight& low, Eight& high, const Rotation& rotation) {
  LLUMD_UNROLL
  for (uint32_t j = 0; j < EIGHT / 2; ++j) {
    float low_even = even_of(low.pair[j]), low_odd = odd_of(low.pair[j]);
    float high_even = even_of(high.pair[j]), high_odd = odd_of(high.pair[j]);
    rotate(low_even, high_even, rotation.cosine[2 * j], rotation.sine[2 * j]);
    rotate(low_odd, high_odd, rotation.cosine[2 * j + 1], rotation.sine[2 * j + 1]);
    low.pair[j] = pair_of(low_even, low_odd);
    high.pair[j] = pair_of(high_even, high_odd);
  }
}

LLUMD_BOTH void put(Bf16* at, Eight e) { *reinterpret_cast<Eight*>(at) = e; }

LLUMD_BOTH void put(uint8_t* at, Eight e) {
  uint64_t bytes = 0;
  LLUMD_UNROLL
  for (uint32_t j = 0; j < EIGHT / 2; ++j) {
    bytes |= static_cast<uint64_t>(to_e4m3(even_of(e.pair[j]))) << 16 * j;
    bytes |= static_cast<uint64_t>(to_e4m3(odd_of(e.pair[j]))) << (16 * j + 8);
  }
  *reinterpret_cast<uint64_t*>(at) = bytes;
}

// Computes one piece of tokens * pieces_of_token().
template <class Entry>
LLUMD_BOTH void append(const Append<Entry>& all, uint32_t piece) {
  const uint32_t token = piece / all.pieces_of_token(), rest = piece % all.pieces_of_token();
  const uint32_t head = rest / all.pieces_of_head(), column = rest % all.pieces_of_head() * EIGHT;
  const bool is_query = head < all.heads, is_key = !is_query && head < all.heads + all.kv_heads;
  const uint32_t own = is_query ? head : is_key ? head - all.heads : head - all.heads - all.kv_heads;
  const Tokens& from = is_query ? all.q : is_key ? all.k : all.v;
  Eight* const at = from.at(token, own * 2 * all.half + column);
  Eight* const partner = from.at(token, own * 2 * all.half + all.half + column);
  Eight low = *at, high = *partner;
  const uint32_t position = static_cast<uint32_t>(all.positions[token]);
  if (is_query || is_key)
    rotate(low, high, rotation_of(all.angles + static_cast<int64_t>(position) * 2 * all.half + column, all.half));
  if (is_query) {
    *at = low;
    *partner = high;
    return;
  }
  const uint32_t sequence = static_cast<uint32_t>(all.rows[token]);
  Entry* const place = (is_key ? all.keys : all.values) + all.pages.place(sequence, position, own) + column;
  put(place, low);
  put(place + all.half, high);
}

}  // namespace llumd
