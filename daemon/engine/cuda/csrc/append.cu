// Norm of heads, rotary embedding and append to the KV pages in one kernel: append.h on the GPU.
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "append.h"
#include "launch.cuh"

namespace {

using llumd::Bf16;
using llumd::data;
using llumd::whole;
using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARP = 32;
constexpr uint32_t EVERY_LANE = 0xFFFFFFFFu;

template <class Entry>
__global__ void __launch_bounds__(THREADS) append_kernel(llumd::Append<Entry> all) {
  llumd::await();
  const uint32_t piece = blockIdx.x * THREADS + threadIdx.x;
  if (piece < all.tokens * all.pieces_of_token()) llumd::append(all, piece);
}

// The pieces of a head are in neighbouring lanes of one warp.
template <class Entry>
__global__ void __launch_bounds__(THREADS) norm_append_kernel(llumd::Append<Entry> all) {
  llumd::await();
  const uint32_t piece = blockIdx.x * THREADS + threadIdx.x;
  const bool is_one = piece < all.tokens * all.pieces_of_token();
  float sum = is_one ? llumd::squares(all, piece) : 0.0f;
  for (uint32_t apart = all.pieces_of_head() / 2; apart; apart /= 2) sum += __shfl_xor_sync(EVERY_LANE, sum, apart);
  if (is_one) llumd::append<true>(all, piece, llumd::inverse_rms(all, sum));
}

// A tensor [tokens, heads, head_dim] with contiguous heads.
llumd::Tokens tokens_of(const TensorView& x, const char* name, const TensorView& q) {
  Bf16* at = data<Bf16>(x, name, kDLBfloat, 3, q);
  TVM_FFI_ICHECK(x.size(0) == q.size(0) && x.size(2) == q.size(2) && x.stride(1) == x.size(2) &&
                 (x.size(0) == 1 || x.stride(0) % llumd::EIGHT == 0) && llumd::aligned(at))
      << name << " has another shape, or is not aligned to 16 bytes";
  return {at, x.stride(0)};
}

// Norms of heads; null: none.
struct Norms {
  const Bf16* q;
  const Bf16* k;
  float offset, eps;
};

Norms norms_of(const Optional<TensorView>& q_norm, const Optional<TensorView>& k_norm, double offset, double eps,
               const TensorView& q) {
  TVM_FFI_ICHECK(q_norm.has_value() == k_norm.has_value()) << "queries and keys are both normalised, or neither";
  if (!q_norm.has_value()) return {};
  const uint32_t pieces = static_cast<uint32_t>(q.size(2) / (2 * llumd::EIGHT));
  TVM_FFI_ICHECK(pieces <= WARP && !(pieces & (pieces - 1))) << "heads of this width cannot be normalised";
  TVM_FFI_ICHECK(q_norm.value().size(0) == q.size(2) && k_norm.value().size(0) == q.size(2)) << "norms of another width";
  return {whole<Bf16>(q_norm.value(), "q_norm", kDLBfloat, 1, q),
          whole<Bf16>(k_norm.value(), "k_norm", kDLBfloat, 1, q), static_cast<float>(offset),
          static_cast<float>(eps)};
}

template <class Entry>
void run(const TensorView& q, const TensorView& k, const TensorView& v, const TensorView& keys,
         const TensorView& values, const llumd::Pages& pages, const TensorView& rows, const TensorView& positions,
         const TensorView& angles, const Norms& norms, DLDataTypeCode code) {
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
      static_cast<uint32_t>(angles.size(1) / 2),
      norms.q,
      norms.k,
      norms.offset,
      norms.eps,
  };
  const uint32_t pieces = all.tokens * all.pieces_of_token();
  const auto kernel = norms.q ? norm_append_kernel<Entry> : append_kernel<Entry>;
  if (pieces) llumd::launch(kernel, (pieces + THREADS - 1) / THREADS, THREADS, 0, q.device(), all);
}

// Rotates q [tokens, heads, head_dim] in place. Writes k [tokens, kv_heads, head_dim], rotated, and v to the pages
// [blocks, block_size, kv_heads, head_dim], bfloat16 or e4m3, at the position of each token in its row's sequence.
// q, k and v may be slices. As many columns of a head are rotated as `angles` [max_len, columns] has. With q_norm and
// k_norm [head_dim], heads are normalised first, by these weights plus `norm_offset`. Launches one kernel on the
// caller's stream, allocates nothing and does not wait; raises for tensors that do not fit.
void append(TensorView q, TensorView k, TensorView v, TensorView keys, TensorView values, TensorView indices,
            TensorView indptr, TensorView rows, TensorView positions, TensorView angles, Optional<TensorView> q_norm,
            Optional<TensorView> k_norm, double norm_offset, double eps) {
  TVM_FFI_ICHECK(q.ndim() == 3 && q.size(2) % (2 * llumd::EIGHT) == 0) << "heads must be multiples of 16 wide";
  TVM_FFI_ICHECK(k.ndim() == 3 && v.ndim() == 3 && k.size(1) == v.size(1) && keys.ndim() == 4 &&
                 keys.size(2) == k.size(1))
      << "k, v and pages differ in heads";
  TVM_FFI_ICHECK(rows.size(0) >= q.size(0) && positions.size(0) >= q.size(0)) << "tokens without a place";
  TVM_FFI_ICHECK(angles.ndim() == 2 && angles.size(1) <= q.size(2) && angles.size(1) % (2 * llumd::EIGHT) == 0)
      << "angles do not fit the heads";
  tvm::ffi::CUDADeviceGuard guard(q.device().device_id);
  const llumd::Pages pages = llumd::pages_of(keys, values, indices, indptr, q.size(2), q);
  const Norms norms = norms_of(q_norm, k_norm, norm_offset, eps, q);
  if (llumd::is(keys, kDLBfloat, 16))
    return run<Bf16>(q, k, v, keys, values, pages, rows, positions, angles, norms, kDLBfloat);
  run<uint8_t>(q, k, v, keys, values, pages, rows, positions, angles, norms, kDLFloat8_e4m3fn);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(append, append);
