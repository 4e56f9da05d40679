// Number formats of activations and KV pages, the rotary embedding, and the location of a token in its pages.
#pragma once

#include "host_device.h"

namespace llumd {

constexpr uint32_t EIGHT = 8;  // bfloat16 in 16 bytes
constexpr float LARGEST_E4M3 = 448.0f;

using Bf16 = uint16_t;  // as bits

struct alignas(16) Eight {
  uint32_t pair[EIGHT / 2];  // the even column in the lower half
};

LLUMD_BOTH float of_bf16(Bf16 x) { return float_of_bits(static_cast<uint32_t>(x) << 16); }
LLUMD_BOTH float even_of(uint32_t pair) { return float_of_bits(pair << 16); }
LLUMD_BOTH float odd_of(uint32_t pair) { return float_of_bits(pair & 0xFFFF0000u); }

// Rounds to nearest even. NaN stays NaN.
LLUMD_BOTH Bf16 to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<Bf16>(bits >> 16 | 0x40u);
  return static_cast<Bf16>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Rounds to nearest even and clamps to the range of e4m3. NaN stays NaN.
LLUMD_BOTH uint8_t to_e4m3(float x) {
  const uint32_t sign = float_bits(x) >> 24 & 0x80u;
  const uint32_t bits = float_bits(x) & 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return static_cast<uint8_t>(sign | 0x7Fu);
  if (bits >= float_bits(LARGEST_E4M3)) return static_cast<uint8_t>(sign | 0x7Eu);
  if (bits < 0x3C800000u) {  // below 2^-6, the smallest normal number: in units of 2^-9
    const float shifted = float_of_bits(bits) + 16384.0f;  // its last place is 2^-9
    return static_cast<uint8_t>(sign | (float_bits(shifted) & 0xFFu));
  }
  const uint32_t rounded = bits + 0x7FFFFu + (bits >> 20 & 1u);
  return static_cast<uint8_t>(sign | ((rounded >> 20) - (120u << 3)));
}

// Rotary embedding of a column in the lower half of a head, and of its partner in the upper.
LLUMD_BOTH void rotate(float& low, float& high, float cosine, float sine) {
  const float rotated = low * cosine - high * sine;
  high = high * cosine + low * sine;
  low = rotated;
}

// The pool of a layer, [blocks, block_size, kv_heads, head_dim]: strides in entries.
struct Pages {
  const int32_t* indices;  // blocks of all sequences
  const int32_t* indptr;   // first index of each sequence
  uint32_t block_size;
  int64_t block_stride;
  int64_t token_stride;
  int64_t head_stride;

  LLUMD_BOTH int64_t place(uint32_t sequence, uint32_t position, uint32_t head) const {
    const int64_t block = indices[indptr[sequence] + static_cast<int32_t>(position / block_size)];
    return block * block_stride + position % block_size * token_stride + head * head_stride;
  }
};

}  // namespace llumd
