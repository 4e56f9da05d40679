// SiLU or GELU, and product: the kernel's own source, compiled for the CPU and called through ctypes. Pieces run from the last to
// the first one, because on a GPU they run in any order.
#include "silu.h"

namespace {

template <class Activation>
void run(const void* gate_up, void* out, uint32_t rows, uint32_t width) {
  const llumd::Gated all{static_cast<const llumd::Bf16*>(gate_up), static_cast<llumd::Bf16*>(out), rows, width};
  for (uint32_t row = rows; row-- > 0;)
    for (uint32_t piece = all.pieces_of_row(); piece-- > 0;) llumd::activate<Activation>(all, row, piece);
}

}  // namespace

extern "C" void silu_mul(const void* gate_up, void* out, uint32_t rows, uint32_t width) {
  run<llumd::Silu>(gate_up, out, rows, width);
}

extern "C" void gelu_tanh_mul(const void* gate_up, void* out, uint32_t rows, uint32_t width) {
  run<llumd::GeluTanh>(gate_up, out, rows, width);
}
