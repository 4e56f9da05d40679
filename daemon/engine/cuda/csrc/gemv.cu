// Products of a few rows with a matrix, fused with the operations around them in a layer: gemv.h on the GPU.
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/optional.h>

#include "gemv.h"
#include "launch.cuh"

namespace {

using llumd::NextWeights;
using llumd::Bf16;
using llumd::Eight;
using llumd::Matrix;
using llumd::Rows;
using llumd::Scales;
using llumd::aligned;
using llumd::data;
using llumd::is;
using llumd::whole;
using tvm::ffi::Optional;
using tvm::ffi::TensorView;

constexpr uint32_t THREADS = 256;
constexpr uint32_t WARP = 32;
constexpr uint32_t EVERY_LANE = 0xFFFFFFFFu;
constexpr int BLOCKS = 2;  // per multiprocessor, which limits registers: 64 KiB of weights are in flight in them
constexpr uint32_t MOST_ROWS = 4;

struct Grid {
  __device__ uint32_t thread() const { return threadIdx.x; }
  __device__ uint32_t threads() const { return THREADS; }
  __device__ uint32_t block() const { return blockIdx.x; }
  __device__ uint32_t blocks() const { return gridDim.x; }
  __device__ uint32_t warp() const { return threadIdx.x / WARP; }
  __device__ uint32_t warps() const { return THREADS / WARP; }
  __device__ uint32_t lane() const { return threadIdx.x % WARP; }
  __device__ uint32_t lanes() const { return WARP; }
  __device__ void sync() const { __syncthreads(); }

  __device__ float sum(float x) const {
    for (uint32_t apart = WARP / 2; apart; apart /= 2) x += __shfl_xor_sync(EVERY_LANE, x, apart);
    return x;
  }

  __device__ Eight fetch(const Eight* at) const {
    Eight e;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(e.pair[0]), "=r"(e.pair[1]), "=r"(e.pair[2]), "=r"(e.pair[3])
                 : "l"(at));
    return e;
  }

  __device__ void prefetch(const Eight* at, uint32_t count) const {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at), "r"(count * uint32_t(sizeof(Eight))));
#endif
  }

  __device__ void await() const { llumd::await(); }
};

template <uint32_t M, class Epilogue>
__global__ void __launch_bounds__(THREADS, BLOCKS) gemv_kernel(Rows rows, Matrix matrix, Epilogue epilogue,
                                                               NextWeights next_weights) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ Scales<M> scales;
  Grid team;
  llumd::multiply<M>(team, rows, matrix, epilogue, next_weights, scales, reinterpret_cast<Eight*>(memory));
}

// Returns as many blocks as can run at the same time, or fewer if there are fewer tasks.
template <class Kernel>
unsigned blocks_of(Kernel kernel, size_t memory, uint32_t tasks, int device) {
  int at_a_time = 0;
  TVM_FFI_CHECK_CUDA_ERROR(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_a_time, kernel, THREADS, memory));
  TVM_FFI_ICHECK_GT(at_a_time, 0) << "the rows do not fit in a multiprocessor";
  const unsigned most = llumd::attribute(cudaDevAttrMultiProcessorCount, device) * at_a_time;
  const unsigned wanted = (tasks + THREADS / WARP - 1) / (THREADS / WARP);
  return wanted < most ? wanted : most;
}

template <uint32_t M, class Epilogue>
void launch(const Rows& rows, const Matrix& matrix, const Epilogue& epilogue, const NextWeights& next_weights,
            DLDevice device) {
  const auto kernel = gemv_kernel<M, Epilogue>;
  const size_t memory = M * rows.groups() * sizeof(Eight);
  llumd::allow_memory(kernel, memory);
  const unsigned blocks = blocks_of(kernel, memory, epilogue.tasks(), device.device_id);
  llumd::launch(kernel, blocks, THREADS, memory, device, rows, matrix, epilogue, next_weights);
}

template <class Epilogue>
void run(const TensorView& x, const Rows& rows, const Matrix& matrix, const Epilogue& epilogue,
         const NextWeights& next_weights = {}) {
  tvm::ffi::CUDADeviceGuard guard(x.device().device_id);
  switch (x.size(0)) {
    case 1: return launch<1>(rows, matrix, epilogue, next_weights, x.device());
    case 2: return launch<2>(rows, matrix, epilogue, next_weights, x.device());
    case 3: return launch<3>(rows, matrix, epilogue, next_weights, x.device());
    case 4: return launch<4>(rows, matrix, epilogue, next_weights, x.device());
  }
  TVM_FFI_ICHECK(false) << "1 to " << MOST_ROWS << " rows can be multiplied, not " << x.size(0);
}

// Returns a vector of bfloat16, or nullptr.
const Bf16* vector(const Optional<TensorView>& tensor, const char* name, int64_t length, const TensorView& x) {
  if (!tensor.has_value()) return nullptr;
  TVM_FFI_ICHECK_EQ(tensor.value().size(0), length) << name << " has another length";
  return whole<Bf16>(tensor.value(), name, kDLBfloat, 1, x);
}

Rows rows_of(const TensorView& x, const Optional<TensorView>& norm, double eps) {
  const Bf16* at = data<Bf16>(x, "x", kDLBfloat, 2, x);
  const Bf16* weights = vector(norm, "norm", x.size(1), x);
  const bool apart = x.size(0) == 1 || x.stride(0) % llumd::EIGHT == 0;  // a single row may have any stride
  TVM_FFI_ICHECK(x.size(1) % llumd::EIGHT == 0 && apart && aligned(at) && aligned(weights))
      << "rows must be multiples of 16 bytes";
  return {at, x.stride(0), static_cast<uint32_t>(x.size(1)), weights, static_cast<float>(eps)};
}

Matrix matrix_of(const TensorView& weight, const Optional<TensorView>& bias, const TensorView& x) {
  const Bf16* at = whole<Bf16>(weight, "weight", kDLBfloat, 2, x);
  TVM_FFI_ICHECK(weight.size(1) == x.size(1) && aligned(at)) << "weight does not fit x";
  return {at, vector(bias, "bias", weight.size(0), x)};
}

// Returns as much of `next` as leaves room in the L2 cache for the data that is read in between.
NextWeights next_weights_of(const Optional<TensorView>& next, const TensorView& x) {
  if (!next.has_value()) return {};
  const Bf16* at = whole<Bf16>(next.value(), "prefetch", kDLBfloat, 2, x);
  TVM_FFI_ICHECK(aligned(at)) << "prefetch must be aligned to 16 bytes";
  const int64_t size = next.value().size(0) * next.value().size(1) * sizeof(Bf16);
  const int64_t room = llumd::attribute(cudaDevAttrL2CacheSize, x.device().device_id) / 2;
  return {reinterpret_cast<const Eight*>(at), static_cast<uint64_t>(size < room ? size : room) / sizeof(Eight)};
}

void check_shape(const TensorView& tensor, const char* name, int64_t rows, int64_t columns) {
  TVM_FFI_ICHECK(tensor.ndim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns)
      << name << " has another shape";
}

// ---- Functions for Python. x: bfloat16[1 to 4, width]. Each launches one kernel on the caller's stream, allocates
// nothing and does not wait; raises for tensors that do not fit.

// residual[rows, n] += x weight^T + bias.
void add(TensorView x, TensorView weight, Optional<TensorView> bias, TensorView residual) {
  Bf16* out = data<Bf16>(residual, "residual", kDLBfloat, 2, x);
  check_shape(residual, "residual", x.size(0), weight.size(0));
  run(x, rows_of(x, {}, 0.0), matrix_of(weight, bias, x),
      llumd::Add{{static_cast<uint32_t>(weight.size(0))}, out, residual.stride(0)});
}

// out[rows, n] = silu(gate) * up of the normalised x. The gates are the first half of weight's rows.
void gate(TensorView x, TensorView norm, double eps, TensorView weight, Optional<TensorView> bias, TensorView out) {
  Bf16* at = data<Bf16>(out, "out", kDLBfloat, 2, x);
  TVM_FFI_ICHECK_EQ(weight.size(0) % 2, 0) << "weight must have a row for each gate and each up";
  check_shape(out, "out", x.size(0), weight.size(0) / 2);
  run(x, rows_of(x, norm, eps), matrix_of(weight, bias, x),
      llumd::Gate{at, out.stride(0), static_cast<uint32_t>(out.size(1))});
}

// out[rows, n] = the normalised x times weight^T, float32.
void logits(TensorView x, TensorView norm, double eps, TensorView weight, TensorView out) {
  float* at = data<float>(out, "out", kDLFloat, 2, x);
  check_shape(out, "out", x.size(0), weight.size(0));
  run(x, rows_of(x, norm, eps), matrix_of(weight, {}, x),
      llumd::Logits{{static_cast<uint32_t>(weight.size(0))}, at, out.stride(0)});
}

template <class Entry>
void run_heads(const TensorView& x, const Rows& rows, const Matrix& matrix, const TensorView& q,
               const TensorView& keys, const TensorView& values, const llumd::Pages& pages,
               const int32_t* positions, const float* angles, const NextWeights& next_weights,
               DLDataTypeCode code) {
  const llumd::Heads<Entry> heads{
      whole<Bf16>(q, "q", kDLBfloat, 3, x),
      data<Entry>(keys, "keys", code, 4, x),
      data<Entry>(values, "values", code, 4, x),
      pages,
      positions,
      angles,
      static_cast<uint32_t>(q.size(1)),
      static_cast<uint32_t>(keys.size(2)),
      static_cast<uint32_t>(q.size(2) / 2),
  };
  run(x, rows, matrix, heads, next_weights);
}

// Writes queries of the normalised x, rotated, to q [rows, heads, head_dim]; keys, rotated, and values to the pages
// [blocks, block_size, kv_heads, head_dim], bfloat16 or e4m3. The position of row i's sequence is positions[i].
// `next_weights`, bfloat16[n, m]: weights to prefetch at the end.
void heads(TensorView x, TensorView norm, double eps, TensorView weight, Optional<TensorView> bias, TensorView q,
           TensorView keys, TensorView values, TensorView indices, TensorView indptr, TensorView positions,
           TensorView angles, Optional<TensorView> next_weights) {
  TVM_FFI_ICHECK(q.ndim() == 3 && q.size(0) == x.size(0) && q.size(2) % 2 == 0) << "q has another shape";
  const llumd::Pages pages = llumd::pages_of(keys, values, indices, indptr, q.size(2), x);
  TVM_FFI_ICHECK_EQ((q.size(1) + 2 * keys.size(2)) * q.size(2), weight.size(0)) << "weight does not fit the heads";
  TVM_FFI_ICHECK(positions.size(0) >= x.size(0) && indptr.size(0) > x.size(0)) << "rows without a place";
  TVM_FFI_ICHECK_EQ(angles.size(1), q.size(2)) << "angles do not fit the heads";
  const int32_t* at = whole<int32_t>(positions, "positions", kDLInt, 1, x);
  const float* rotations = whole<float>(angles, "angles", kDLFloat, 2, x);
  const Rows rows = rows_of(x, norm, eps);
  const Matrix matrix = matrix_of(weight, bias, x);
  const NextWeights next = next_weights_of(next_weights, x);
  if (is(keys, kDLBfloat, 16))
    return run_heads<Bf16>(x, rows, matrix, q, keys, values, pages, at, rotations, next, kDLBfloat);
  run_heads<uint8_t>(x, rows, matrix, q, keys, values, pages, at, rotations, next, kDLFloat8_e4m3fn);
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(add, add);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gate, gate);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(logits, logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(heads, heads);
