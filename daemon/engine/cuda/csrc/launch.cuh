// Shared by the launchers of our kernels: checks of tensors, and programmatic dependent launch (a kernel may begin
// before the previous one has ended).
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

// Waits until all writes of the previous kernels are visible, then lets the next kernel begin. That one also waits here
// before it reads or writes memory of this kernel.
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

// Lets `kernel` use `bytes` of shared memory per block. The limit is never lowered: a graph may hold launches that
// need it.
template <class Kernel>
void allow_memory(Kernel kernel, size_t bytes) {
  cudaFuncAttributes now{};
  TVM_FFI_CHECK_CUDA_ERROR(cudaFuncGetAttributes(&now, kernel));
  if (static_cast<size_t>(now.maxDynamicSharedSizeBytes) >= bytes) return;
  TVM_FFI_CHECK_CUDA_ERROR(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// True if a kernel may begin before the previous one has ended. LLUMD_EARLY_LAUNCH=off turns this off, to find out if
// it causes an error.
inline bool may_begin_early(int device) {
  static const char* const setting = std::getenv("LLUMD_EARLY_LAUNCH");
  if (setting && std::strcmp(setting, "off") == 0) return false;
  return attribute(cudaDevAttrComputeCapabilityMajor, device) >= FIRST_MAJOR_WITH_EARLY_LAUNCH;
}

// Launches a kernel on the caller's stream. The kernel must call `await` before it depends on previous kernels.
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

// ---- Tensors. A tensor that does not fit raises an error with its name.

inline bool is(const TensorView& tensor, DLDataTypeCode code, int bits) {
  const DLDataType dtype = tensor.dtype();
  return dtype.code == code && dtype.bits == bits && dtype.lanes == 1;
}

// Returns the data of a tensor, which must be on the device of `x`.
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

// Describes keys and values of a layer, [blocks, block_size, kv_heads, head_dim] each, and the blocks of the sequences.
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
