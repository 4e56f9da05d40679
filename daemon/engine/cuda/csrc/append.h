// Prepares a step's queries, keys and values for attention: queries are rotated in place, keys are rotated and written
// to the pages, values are written to the pages unchanged. Queries and keys may be normalised before, head by head. A
// piece of the work is eight columns and their eight partners: with them they are rotated, or not at all. Pieces are
// independent, but for the sum of squares of a head.
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
  const float* angles;  // [max_len, 2 rotated]: cosines, then sines
  uint32_t tokens, heads, kv_heads;
  uint32_t half;     // of a head's width, a multiple of EIGHT
  uint32_t rotated;  // pairs of columns of a head that are rotated, a multiple of EIGHT; the other columns stay
  const Bf16* q_norm;  // weights of the norm of a head, [2 half]; null: no norm
  const Bf16* k_norm;
  float norm_offset;  // added to the weights
  float eps;

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

// Where a piece is.
struct Piece {
  uint32_t token;
  uint32_t head;    // of the queries, keys or values
  uint32_t column;  // of the first eight
  uint32_t partner;
  bool is_query, is_key, is_rotated;
  Eight* at;
  Eight* at_partner;
};

template <class Entry>
LLUMD_BOTH Piece piece_of(const Append<Entry>& all, uint32_t piece) {
  const uint32_t token = piece / all.pieces_of_token(), rest = piece % all.pieces_of_token();
  const uint32_t head = rest / all.pieces_of_head(), column = rest % all.pieces_of_head() * EIGHT;
  const bool is_query = head < all.heads, is_key = !is_query && head < all.heads + all.kv_heads;
  const uint32_t own = is_query ? head : is_key ? head - all.heads : head - all.heads - all.kv_heads;
  const Tokens& from = is_query ? all.q : is_key ? all.k : all.v;
  // The columns that are not rotated come after those that are, and are paired in the same way.
  const bool is_rotated = column < all.rotated;
  const uint32_t first = is_rotated ? column : column + all.rotated;
  const uint32_t partner = column + (is_rotated ? all.rotated : all.half);
  return {token,  own,        first,
          partner, is_query,   is_key,
          is_rotated && (is_query || is_key),
          from.at(token, own * 2 * all.half + first),
          from.at(token, own * 2 * all.half + partner)};
}

LLUMD_BOTH float squares_of(const Eight& e) {
  float sum = 0.0f;
  LLUMD_UNROLL
  for (uint32_t j = 0; j < EIGHT / 2; ++j)
    sum += even_of(e.pair[j]) * even_of(e.pair[j]) + odd_of(e.pair[j]) * odd_of(e.pair[j]);
  return sum;
}

// Returns the sum of squares of a piece. The sum over the pieces of its head gives the argument of `inverse_rms`.
template <class Entry>
LLUMD_BOTH float squares(const Append<Entry>& all, uint32_t piece) {
  const Piece own = piece_of(all, piece);
  return squares_of(*own.at) + squares_of(*own.at_partner);
}

template <class Entry>
LLUMD_BOTH float inverse_rms(const Append<Entry>& all, float squares_of_head) {
  return 1.0f / sqrtf(squares_of_head / static_cast<float>(2 * all.half) + all.eps);
}

LLUMD_BOTH void normalise(Eight& e, const Bf16* weights, float inverse_rms, float offset) {
  LLUMD_UNROLL
  for (uint32_t j = 0; j < EIGHT / 2; ++j)
    e.pair[j] = pair_of(even_of(e.pair[j]) * inverse_rms * (of_bf16(weights[2 * j]) + offset),
                        odd_of(e.pair[j]) * inverse_rms * (of_bf16(weights[2 * j + 1]) + offset));
}

// Computes one piece of tokens * pieces_of_token(). `inverse_rms`: of its head, if heads are normalised.
template <bool NORM = false, class Entry>
LLUMD_BOTH void append(const Append<Entry>& all, uint32_t piece, float inverse_rms = 1.0f) {
  const Piece own = piece_of(all, piece);
  Eight low = *own.at, high = *own.at_partner;
  if constexpr (NORM) {
    if (own.is_query || own.is_key) {
      const Bf16* const weights = own.is_query ? all.q_norm : all.k_norm;
      normalise(low, weights + own.column, inverse_rms, all.norm_offset);
      normalise(high, weights + own.partner, inverse_rms, all.norm_offset);
    }
  }
  const uint32_t position = static_cast<uint32_t>(all.positions[own.token]);
  if (own.is_rotated) {
    const float* const angles = all.angles + static_cast<int64_t>(position) * 2 * all.rotated + own.column;
    rotate(low, high, rotation_of(angles, all.rotated));
  }
  if (own.is_query) {
    *own.at = low;
    *own.at_partner = high;
    return;
  }
  const uint32_t sequence = static_cast<uint32_t>(all.rows[own.token]);
  Entry* const place = (own.is_key ? all.keys : all.values) + all.pages.place(sequence, position, own.head);
  put(place + own.column, low);
  put(place + own.partner, high);
}

}  // namespace llumd
