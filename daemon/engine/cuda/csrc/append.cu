// Rotary embedding and append to the KV pages in one kernel: append.h on the GPU.
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>

#include "append.h"
#include "launch.cuh"

namespace {

using llumd::Bf16;
using llumd::data;
using llumd::whole;
using tvm::ffi::TensorView;

constexpr uint32_t THREADS = 256;

template <class Entry>
__global__ void __launch_bounds__(THREADS) append_kernel(llumd::Append<Entry> all) {
  llumd::await();
  const uint32_t piece = blockIdx.x * THREADS + threadIdx.x;
  if (piece < all.tokens * all.pieces_of_token()) llumd::append(all, piece);
}

// A tensor [tokens, heads, head_dim] with contiguous heads.
llumd::Tokens tokens_of(const TensorView& x, const char* name, const TensorView& q) {
  Bf16* at = data<Bf16>(x, name, kDLBfloat, 3, q);
  TVM_FFI_ICHECK(x.size(0) == q.size(0) && x.size(2) == q.size(2) && x.stride(1) == x.size(2) &&
                 (x.size(0) == 1 || x.stride(0) % llumd::EIGHT == 0) && llumd::aligned(at))
      << name << " has another shape, or is not aligned to 16 bytes";
  return {at, x.stride(0)};
}

template <class Entry>
void run(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& keys,
         const TensorView& values, const llumd::Pages& pages, const TensorView& rows, const TensorView& positions,
         const TensorView& angles, DLDataTypeCode code) {
  const llumd::Append<Entry> all{
      tokens_of(q, "q", q),
      tokens_of(k, "k", q),
      tokens_of(v, "v", q),
      data<Entry>(keys, "keys", code, 4, q),
      data<Entry>(values, "values", code, 4, q),
      pages,
      whole<int32_t>(rows, "rows", kDLInt, 1, q),
      whole<int32_t>(positions, "positions", kDLInt, 1, q),
      whole<float>(angles, "angles", kDLFloat, 2, q),
      static_cast<uint32_t>(q.size(0)),
      static_cast<uint32_t>(q.size(1)),
      static_cast<uint32_t>(k.size(1)),
      static_cast<uint32_t>(q.size(2) / 2),
  };
  const uint32_t pieces = all.tokens * all.pieces_of_token();
  if (pieces) llumd::launch(append_kernel<Entry>, (pieces + THREADS - 1) / THREADS, THREADS, 0, q.device(), all);
}

// Rotates q [tokens, heads, head_dim] in place. Writes k [tokens, kv_heads, head_dim], rotated, and v to the pages
// [blocks, block_size, kv_heads, head_dim], bfloat16 or e4m3, at the position of each token in its row's sequence.
// q, k and v may be slices. Launches one kernel on the caller's stream, allocates nothing and does not wait; raises
// for tensors that do not fit.
void append(TensorView q, TensorView k, TensorView v, TensorView keys, TensorView values, TensorView indices,
            TensorView indptr, TensorView rows, TensorView positions, TensorView angles) {
  TVM_FFI_ICHECK(q.ndim() == 3 && q.size(2) % (2 * llumd::EIGHT) == 0) << "heads must be multiples of 16 wide";
  TVM_FFI_ICHECK(k.ndim() == 3 && v.ndim() == 3 && k.size(1) == v.size(1) && keys.ndim() == 4 &&
                 keys.size(2) == k.size(1))
      << "k, v and pages differ in heads";
  TVM_FFI_ICHECK(rows.size(0) >= q.size(0) && positions.size(0) >= q.size(0)) << "tokens without a place";
  TVM_FFI_ICHECK(angles.ndim() == 2 && angles.size(1) == q.size(2)) << "angles do not fit the heads";
  tvm::ffi::CUDADeviceGuard guard(q.device().device_id);
  const llumd::Pages pages = llumd::pages_of(keys, values, indices, indptr, q.size(2), q);
  if (llumd::is(keys, kDLBfloat, 16))
    return run<Bf16>(q, k, v, keys, values, pages, rows, positions, angles, kDLBfloat);
  run<uint8_t>(q, k, v, keys, values, pages, rows, positions, angles, kDLFloat8_e4m3fn);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, append);
