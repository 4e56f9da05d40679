// Rotary embedding and append: the kernel's own source, compiled for the CPU and called through ctypes. Pieces run from
// the last to the first one, because on a GPU they run in any order.
#include "append.h"

namespace {

template <class Entry>
void run(const void* description) {
  const auto& all = *static_cast<const llumd::Append<Entry>*>(description);
  for (uint32_t piece = all.tokens * all.pieces_of_token(); piece-- > 0;) llumd::append(all, piece);
}

}  // namespace

// `all`: an Append<Bf16>, or with `e4m3` an Append<uint8_t>. Both have the same layout.
extern "C" void append(const void* all, bool e4m3) { e4m3 ? run<uint8_t>(all) : run<llumd::Bf16>(all); }
