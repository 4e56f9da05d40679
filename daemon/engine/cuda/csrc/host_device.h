// Macros and bit casts for code that runs on the GPU and on the CPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define LLUMD_BOTH __host__ __device__ __forceinline__
#else
#define LLUMD_BOTH inline
#endif

#ifdef __CUDA_ARCH__
#define LLUMD_UNROLL _Pragma("unroll")
#else
#define LLUMD_UNROLL
#endif

namespace llumd {

LLUMD_BOTH uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

LLUMD_BOTH float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace llumd
