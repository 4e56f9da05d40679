// Norm of heads, rotary embedding and append: the kernel's own source, compiled for the CPU and called through ctypes. Pieces run from
// the last to the first one, because on a GPU they run in any order.
#include "append.h"

namespace {

template <class Entry>
void run(const void* description) {
  const auto& all = *static_cast<const llumd::Append<Entry>*>(description);
  const uint32_t pieces = all.tokens * all.pieces_of_token(), of_head = all.pieces_of_head();
  if (!all.q_norm) {
    for (uint32_t piece = pieces; piece-- > 0;) llumd::append(all, piece);
    return;
  }
  for (uint32_t head = pieces / of_head; head-- > 0;) {
    float sum = 0.0f;
    for (uint32_t i = of_head; i-- > 0;) sum += llumd::squares(all, head * of_head + i);
    const float inverse_rms = llumd::inverse_rms(all, sum);
    for (uint32_t i = of_head; i-- > 0;) llumd::append<true>(all, head * of_head + i, inverse_rms);
  }
}

}  // namespace

// `all`: an Append<Bf16>, or with `e4m3` an Append<uint8_t>. Both have the same layout.
extern "C" void append(const void* all, bool e4m3) { e4m3 ? run<uint8_t>(all) : run<llumd::Bf16>(all); }
