// What our kernels' callers have in common: tensors looked at, and launches that may begin before what is in front of
// them has ended.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/extra/cuda/base.h>

#include <cstdlib>
#include <cstring>

#include "pages.h"

namespace llumd {

using tvm::ffi::TensorView;

constexpr int FIRST_MAJOR_WITH_EARLY_LAUNCH = 9;

// ---- Launches

// Until all that the kernels in front have written is there. The kernel behind may begin as well: it waits likewise
// before it touches what this one reads or writes.
__device__ __forceinline__ void await() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

inline int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  TVM_FFI_CHECK_CUDA_ERROR(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// Lets `kernel` have so many bytes of a block's memory at a launch. What it may have is never taken back: a graph may
// hold launches that need it.
template <class Kernel>
void allow_memory(Kernel kernel, size_t bytes) {
  cudaFuncAttributes now{};
  TVM_FFI_CHECK_CUDA_ERROR(cudaFuncGetAttributes(&now, kernel));
  if (static_cast<size_t>(now.maxDynamicSharedSizeBytes) >= bytes) return;
  TVM_FFI_CHECK_CUDA_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// Whether a kernel may begin before the one in front has ended. LLUMD_EARLY_LAUNCH=off has all wait, to find out whether
// that is what goes wrong.
inline bool may_begin_early(int device) {
  static const char* const wish = std::getenv("LLUMD_EARLY_LAUNCH");
  if (wish && std::strcmp(wish, "off") == 0) return false;
  return attribute(cudaDevAttrComputeCapabilityMajor, device) >= FIRST_MAJOR_WITH_EARLY_LAUNCH;
}

// Launches a kernel that calls `await` first of all, or after what needs nothing of the kernels in front, on the caller's
// stream.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t memory, DLDevice device,
            const Arguments&... arguments) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = memory;
  config.stream = static_cast<cudaStream_t>(TVMFFIEnvGetStream(device.device_type, device.device_id));
  config.attrs = &early;
  config.numAttrs = may_begin_early(device.device_id) ? 1 : 0;
  TVM_FFI_CHECK_CUDA_ERROR(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// ---- Tensors. Whatever does not fit raises, by its name.

inline bool is(const TensorView& tensor, DLDataTypeCode code, int bits) {
  const DLDataType dtype = tensor.dtype();
  return dtype.code == code && dtype.bits == bits && dtype.lanes == 1;
}

// The data of a tensor on the device of `x`.
template <class T>
T* data(const TensorView& tensor, const char* name, DLDataTypeCode code, int dim, const TensorView& x) {
  TVM_FFI_ICHECK(is(tensor, code, sizeof(T) * 8)) << name << " has another dtype";
  TVM_FFI_ICHECK(tensor.ndim() == dim && tensor.stride(dim - 1) == 1)
      << name << " has another shape, or gaps between its entries";
  TVM_FFI_ICHECK(tensor.device().device_type == kDLCUDA && tensor.device().device_id == x.device().device_id)
      << name << " is not on the device of the others";
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* whole(const TensorView& tensor, const char* name, DLDataTypeCode code, int dim, const TensorView& x) {
  TVM_FFI_ICHECK(tensor.IsContiguous()) << name << " must be contiguous";
  return data<T>(tensor, name, code, dim, x);
}

inline bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % sizeof(Eight) == 0; }

// Keys and values of a layer, [blocks, block_size, kv_heads, head_dim] both, and the sequences' blocks.
inline Pages pages_of(const TensorView& keys, const TensorView& values, const TensorView& indices,
                      const TensorView& indptr, int64_t head_dim, const TensorView& x) {
  TVM_FFI_ICHECK(keys.ndim() == 4 && values.ndim() == 4 && keys.size(3) == head_dim) << "pages have another shape";
  for (int i = 0; i < 4; ++i)
    TVM_FFI_ICHECK(keys.size(i) == values.size(i) && keys.stride(i) == values.stride(i)) << "keys and values differ";
  for (int i = 0; i < 3; ++i)
    TVM_FFI_ICHECK(keys.size(i) == 1 || keys.stride(i) % EIGHT == 0) << "pages must be multiples of eight entries";
  TVM_FFI_ICHECK(aligned(keys.data_ptr()) && aligned(values.data_ptr())) << "pages must be aligned to 16 bytes";
  return {whole<int32_t>(indices, "indices", kDLInt, 1, x), whole<int32_t>(indptr, "indptr", kDLInt, 1, x),
          static_cast<uint32_t>(keys.size(1)), keys.stride(0), keys.stride(1), keys.stride(2)};
}

}  // namespace llumd
