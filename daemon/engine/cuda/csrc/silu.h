// The activation of the gate times up, eight columns at a time: SiLU, or GELU by its tanh formula. A piece of the work
// is eight columns of one row. Pieces are independent.
#pragma once

#include "pages.h"

namespace llumd {

struct Gated {
  const Bf16* gate_up;  // [rows, 2 width]: gates, then ups
  Bf16* out;            // [rows, width]
  uint32_t rows;
  uint32_t width;  // a multiple of EIGHT

  LLUMD_BOTH uint32_t pieces_of_row() const { return width / EIGHT; }
};

struct Silu {
  LLUMD_BOTH static float times(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }
};

struct GeluTanh {
  LLUMD_BOTH static float times(float gate, float up) {
    // (1 + tanh(x)) / 2 is 1 / (1 + exp(-2 x)), which does not cancel for negative x. The factor is 2 sqrt(2 / pi).
    const float twice = 1.5957691216057308f * (gate + 0.044715f * gate * gate * gate);
    return gate / (1.0f + expf(-twice)) * up;
  }
};

// Computes one piece: `piece` of the row.
template <class Activation>
LLUMD_BOTH void activate(const Gated& all, uint32_t row, uint32_t piece) {
  const Bf16* const from = all.gate_up + static_cast<int64_t>(row) * 2 * all.width + piece * EIGHT;
  const Eight gate = *reinterpret_cast<const Eight*>(from);
  const Eight up = *reinterpret_cast<const Eight*>(from + all.width);
  Eight out;
  LLUMD_UNROLL
  for (uint32_t j = 0; j < EIGHT / 2; ++j) {
    const Bf16 even = to_bf16(Activation::times(even_of(gate.pair[j]), even_of(up.pair[j])));
    const Bf16 odd = to_bf16(Activation::times(odd_of(gate.pair[j]), odd_of(up.pair[j])));
    out.pair[j] = even | static_cast<uint32_t>(odd) << 16;
  }
  *reinterpret_cast<Eight*>(all.out + static_cast<int64_t>(row) * all.width + piece * EIGHT) = out;
}

}  // namespace llumd
