// Rotary embedding and append, the kernel's own source compiled for the CPU and called through ctypes: piece by piece,
// from the last to the first, for on a GPU they come in any order.
#include "append.h"

namespace {

template <class Entry>
void run(const void* description) {
  const auto& all = *static_cast<const llumd::Append<Entry>*>(description);
  for (uint32_t piece = all.tokens * all.pieces_of_token(); piece-- > 0;) llumd::append(all, piece);
}

}  // namespace

// `all`: an Append<Bf16>, or with `e4m3` an Append<uint8_t>, which are laid out alike.
extern "C" void append(const void* all, bool e4m3) { e4m3 ? run<uint8_t>(all) : run<llumd::Bf16>(all); }
