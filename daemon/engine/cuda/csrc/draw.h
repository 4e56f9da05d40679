// The arithmetic of sampling, for the GPU and the CPU. daemon/engine/sampling/noise.py and filters.py define every
// step.
//
// No multiplication may be fused with an addition: build with -fmad=false (nvcc) or -ffp-contract=off, and without
// fast-math options.
#pragma once

#include "host_device.h"

namespace llumd {

constexpr float MAX_FLOAT = 3.40282346638528859812e38f;
constexpr float MAX_NOISE = 22.88f;
constexpr float MARGIN = 1e-3f;  // more than the rounding errors of noise and score
constexpr float LEAST = -44.0f;
constexpr uint32_t STREAM_DRAW = 0;
constexpr uint32_t GROUP = 4;  // tokens that share a Philox counter
constexpr int32_t NO_TOKEN = -1;

// ---- Order

// An integer that sorts like the float. -0.0 counts as 0.0, NaN as -inf.
LLUMD_BOTH uint32_t order_of(float x) {
  uint32_t bits = float_bits(x);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude == 0) bits = 0;
  if (magnitude > 0x7F800000u) bits = 0xFF800000u;
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

LLUMD_BOTH float float_of_order(uint32_t order) {
  return float_of_bits(order >> 31 ? order & 0x7FFFFFFFu : ~order);
}

// Defines the order of candidates: larger values first, of equal values the lower id first. The first candidate has the
// largest key.
LLUMD_BOTH uint64_t key_of(float x, uint32_t token) {
  return static_cast<uint64_t>(order_of(x)) << 32 | (0xFFFFFFFFu - token);
}

// A lower bound of the keys of tokens with a value of at least x. It is above the keys of all other tokens.
LLUMD_BOTH uint64_t least_key(float x) { return static_cast<uint64_t>(order_of(x)) << 32; }

LLUMD_BOTH uint32_t token_of(uint64_t key) { return 0xFFFFFFFFu - static_cast<uint32_t>(key); }

LLUMD_BOTH float value_of(uint64_t key) { return float_of_order(static_cast<uint32_t>(key >> 32)); }

// ---- Noise

struct Words {
  uint32_t lane[GROUP];
};

// Philox4x32-10: the words of tokens 4 * group ... 4 * group + 3.
LLUMD_BOTH Words philox(uint32_t position, uint32_t group, uint32_t stream, uint64_t seed) {
  uint32_t c0 = position, c1 = group, c2 = stream, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

LLUMD_BOTH uint32_t word_of(uint32_t position, uint32_t token, uint32_t stream, uint64_t seed) {
  const Words words = philox(position, token / GROUP, stream, seed);
  const uint32_t low = token & 1 ? words.lane[1] : words.lane[0];
  const uint32_t high = token & 1 ? words.lane[3] : words.lane[2];
  return token & 2 ? high : low;
}

// The log of a positive normal float64.
LLUMD_BOTH double exact_log(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  int e = static_cast<int>(bits >> 52) - 1022;
  bits = (bits & 0x000FFFFFFFFFFFFFull) | 0x3FE0000000000000ull;
  double f;
  memcpy(&f, &bits, sizeof f);
  if (f < 0.7071067811865476) {
    f = f * 2.0;
    e -= 1;
  }
  const double s = (f - 1.0) / (f + 1.0);
  const double z = s * s;
  double t = 1.0 / 21.0;
  t = t * z + 1.0 / 19.0;
  t = t * z + 1.0 / 17.0;
  t = t * z + 1.0 / 15.0;
  t = t * z + 1.0 / 13.0;
  t = t * z + 1.0 / 11.0;
  t = t * z + 1.0 / 9.0;
  t = t * z + 1.0 / 7.0;
  t = t * z + 1.0 / 5.0;
  t = t * z + 1.0 / 3.0;
  t = t * z + 1.0;
  return static_cast<double>(e) * 0.6931471805599453 + (2.0 * s) * t;
}

LLUMD_BOTH float gumbel(uint32_t word) {
  const double v = (static_cast<double>(word) + 0.5) * (1.0 / 4294967296.0);
  return static_cast<float>(-exact_log(-exact_log(1.0 - v)));
}

// ---- Probability

// exp(x) in units of 2^-40, for x in [LEAST, 0].
LLUMD_BOTH int64_t weight(float x) {
  const int32_t n = static_cast<int32_t>(x * 1.44269504f - 0.5f);
  const float k = static_cast<float>(n);
  const float r = (x - k * 0.693359375f) - k * -2.12194440e-4f;
  float p = static_cast<float>(1.0 / 5040.0);
  p = p * r + static_cast<float>(1.0 / 720.0);
  p = p * r + static_cast<float>(1.0 / 120.0);
  p = p * r + static_cast<float>(1.0 / 24.0);
  p = p * r + static_cast<float>(1.0 / 6.0);
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (static_cast<int64_t>(static_cast<int32_t>(p * 16777216.0f)) << 16) >> -n;
}

// The difference between a logit and the row's largest one, divided by the temperature.
struct Scale {
  float largest;  // finite
  float inverse_temperature;

  LLUMD_BOTH float scaled(float logit) const {
    return ((logit > MAX_FLOAT ? MAX_FLOAT : logit) - largest) * inverse_temperature;
  }

  LLUMD_BOTH int64_t weight_of(float logit) const {
    const float x = scaled(logit);
    return weight(x > LEAST ? x : LEAST);  // the weight of NaN is 0
  }
};

// The weight that top-p must reach: the share `top_p` of `total`, at least the first token.
LLUMD_BOTH int64_t nucleus_target(int64_t total, double top_p) {
  const double share = static_cast<double>(total) * top_p;
  int64_t target = static_cast<int64_t>(share);
  if (static_cast<double>(target) < share) ++target;
  if (target > total) target = total;
  return target < 1 ? 1 : target;
}

// The largest word with which a token `gap` below the best known score can still win: its noise needs
// -log(1 - v) <= exp(-gap), and v <= -log(1 - v). For gap <= MAX_NOISE + MARGIN.
LLUMD_BOTH uint32_t largest_word(float gap) {
  if (gap <= MARGIN) return 0xFFFFFFFFu;
  const int64_t word = (weight(MARGIN - gap) >> 8) + 1;
  return word > 0xFFFFFFFFll ? 0xFFFFFFFFu : static_cast<uint32_t>(word);
}

}  // namespace llumd
