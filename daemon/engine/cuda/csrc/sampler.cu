// Sampling on the GPU: a cluster of blocks samples one row's token. Its logits are in the blocks' shared memory.
#include <cooperative_groups.h>
#include <tvm/ffi/extra/cuda/device_guard.h>
#include <tvm/ffi/function.h>

#include "launch.cuh"
#include "row.h"

namespace {

using llumd::attribute;
using tvm::ffi::TensorView;

constexpr uint32_t THREADS = 512;
constexpr uint32_t WARP = 32;
constexpr uint32_t EVERY_LANE = 0xFFFFFFFFu;
constexpr uint32_t MOST_BLOCKS = 8;       // the cluster size that every GPU with clusters supports
constexpr uint32_t AIMED_SLICE = 16384;   // tokens: two blocks of 64 KiB with their bins fit in a multiprocessor
constexpr int FIRST_MAJOR_WITH_CLUSTERS = 9;

// One array per field, one entry per row. daemon/engine/cuda/sampler.py describes them (SamplingTensors).
struct Params {
  const float* inverse_temperature;
  const float* min_p_depth;
  const int32_t* top_k;
  const double* top_p;
  const int64_t* seed;
  const int32_t* position;

  __device__ llumd::RowParams row(uint32_t i) const {
    return {inverse_temperature[i], min_p_depth[i], top_k[i], top_p[i], static_cast<uint64_t>(seed[i]),
            static_cast<uint32_t>(position[i])};
  }
};

// A cluster as a `Team` (row.h). GPUs before Hopper have no clusters: there a team is one block.
class Cluster {
 public:
  __device__ explicit Cluster(llumd::Shared* own) : own_(own) {}

  __device__ uint32_t thread() const { return threadIdx.x; }
  __device__ uint32_t threads() const { return THREADS; }
  __device__ uint32_t warp() const { return threadIdx.x / WARP; }
  __device__ uint32_t warps() const { return THREADS / WARP; }
  __device__ bool leads_warp() const { return threadIdx.x % WARP == 0; }
  __device__ llumd::Shared& own() const { return *own_; }  // not by map_shared_rank, which would be slower
  __device__ void sync() const { __syncthreads(); }
  __device__ void add(uint32_t* word, uint32_t amount) const { atomicAdd(word, amount); }

  __device__ uint32_t warp_max(uint32_t x) const { return __reduce_max_sync(EVERY_LANE, x); }

  __device__ uint64_t warp_max(uint64_t x) const {
    const uint32_t high = static_cast<uint32_t>(x >> 32);
    const uint32_t highest = warp_max(high);
    const uint32_t low = warp_max(high == highest ? static_cast<uint32_t>(x) : 0u);
    return static_cast<uint64_t>(highest) << 32 | low;
  }

#if __CUDA_ARCH__ >= 900
  __device__ uint32_t block() const { return cooperative_groups::this_cluster().block_rank(); }
  __device__ uint32_t blocks() const { return cooperative_groups::this_cluster().num_blocks(); }
  __device__ void sync_all() const { cooperative_groups::this_cluster().sync(); }
  __device__ llumd::Shared& shared(uint32_t block) const {
    return *cooperative_groups::this_cluster().map_shared_rank(own_, block);
  }
#else
  __device__ uint32_t block() const { return 0; }
  __device__ uint32_t blocks() const { return 1; }
  __device__ void sync_all() const { __syncthreads(); }
  __device__ llumd::Shared& shared(uint32_t) const { return *own_; }
#endif

 private:
  llumd::Shared* own_;
};

// Copies the slice to `kept`, padded to a group. Each thread later reads only its own writes.
__device__ llumd::Slice keep(const llumd::Slice& slice, llumd::Group* kept) {
  for (uint32_t g = threadIdx.x; g < slice.groups(); g += THREADS) kept[g] = slice.group(g);
  return {reinterpret_cast<const float*>(kept), slice.first, slice.groups() * llumd::GROUP, true};
}

// Each group of `blocks` blocks, one cluster, samples a row. `keeps`: the slice fits in shared memory.
__global__ void __launch_bounds__(THREADS)
    draw_kernel(const float* logits, int64_t stride, uint32_t vocab, uint32_t blocks, bool keeps, Params params,
                int32_t* out) {
  extern __shared__ __align__(16) unsigned char memory[];
  Cluster team(reinterpret_cast<llumd::Shared*>(memory));
  const uint32_t row = blockIdx.x / blocks;
  llumd::Slice slice = llumd::slice_of(logits + row * stride, vocab, team.block(), blocks);
  if (keeps) slice = keep(slice, reinterpret_cast<llumd::Group*>(memory + sizeof(llumd::Shared)));
  const int32_t token = llumd::draw_row(team, slice, params.row(row), vocab);
  if (team.block() == 0 && team.thread() == 0) out[row] = token;
  team.sync_all();  // another block may still read this block's memory
}

// Returns the blocks for a row: enough to hold it, and more while the GPU has idle multiprocessors.
uint32_t blocks_for(int64_t rows, uint32_t vocab, int device) {
  if (attribute(cudaDevAttrComputeCapabilityMajor, device) < FIRST_MAJOR_WITH_CLUSTERS) return 1;
  const int64_t processors = attribute(cudaDevAttrMultiProcessorCount, device);
  uint32_t blocks = 1;
  while (blocks < MOST_BLOCKS &&
         (llumd::slice_length(vocab, blocks) > AIMED_SLICE || rows * blocks * 2 <= processors))
    blocks *= 2;
  return blocks;
}

void launch(const float* logits, int64_t stride, int64_t rows, uint32_t vocab, const Params& params, int32_t* out,
            DLDevice device) {
  const uint32_t blocks = blocks_for(rows, vocab, device.device_id);
  TVM_FFI_ICHECK_LE(llumd::slice_length(vocab, blocks), llumd::MAX_SLICE) << "the vocabulary is too large";
  const size_t room = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device.device_id);
  const size_t kept = sizeof(llumd::Shared) + llumd::slice_length(vocab, blocks) * sizeof(float);
  const bool keeps = kept <= room;
  const size_t memory = keeps ? kept : sizeof(llumd::Shared);
  llumd::allow_memory(draw_kernel, memory);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = blocks;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(rows * blocks));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = memory;
  config.stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  config.attrs = &cluster;
  config.numAttrs = blocks > 1 ? 1 : 0;
  TVM_FFI_CHECK_CUDA_ERROR(
      cudaLaunchKernelEx(&config, draw_kernel, logits, stride, vocab, blocks, keeps, params, out));
}

// Returns the data of a vector with one entry per row, on the device of the logits.
template <class T>
T* entries(const TensorView& tensor, const char* name, DLDataTypeCode code, const TensorView& logits) {
  T* const at = llumd::whole<T>(tensor, name, code, 1, logits);
  TVM_FFI_ICHECK_EQ(tensor.size(0), logits.size(0)) << name << " must have an entry for each row of logits";
  return at;
}

// out[row] = the token sampled from logits[row]: float32[rows, vocab] with any stride between rows. Raises for
// tensors that do not fit. Launches one kernel on the caller's stream, allocates nothing and does not wait.
void draw(TensorView logits, TensorView inverse_temperature, TensorView min_p_depth, TensorView top_k,
          TensorView top_p, TensorView seed, TensorView position, TensorView out) {
  TVM_FFI_ICHECK(llumd::is(logits, kDLFloat, 32)) << "logits must be float32";
  TVM_FFI_ICHECK(logits.ndim() == 2 && logits.size(1) > 0 && logits.stride(1) == 1)
      << "logits must be [rows, vocab] with contiguous rows";
  TVM_FFI_ICHECK_EQ(logits.device().device_type, kDLCUDA) << "logits must be on a CUDA device";
  const Params params{
      entries<float>(inverse_temperature, "inverse_temperature", kDLFloat, logits),
      entries<float>(min_p_depth, "min_p_depth", kDLFloat, logits),
      entries<int32_t>(top_k, "top_k", kDLInt, logits),
      entries<double>(top_p, "top_p", kDLFloat, logits),
      entries<int64_t>(seed, "seed", kDLInt, logits),
      entries<int32_t>(position, "position", kDLInt, logits),
  };
  int32_t* tokens = entries<int32_t>(out, "out", kDLInt, logits);
  if (logits.size(0) == 0) return;
  tvm::ffi::CUDADeviceGuard guard(logits.device().device_id);
  launch(static_cast<const float*>(logits.data_ptr()), logits.stride(0), logits.size(0),
         static_cast<uint32_t>(logits.size(1)), params, tokens, logits.device());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(draw, draw);
