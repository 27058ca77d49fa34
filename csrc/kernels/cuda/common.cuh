// What all CUDA kernels share: vectors, casts, launches. Compiles under nvcc, and under g++ with the shim (../shim).
//
// Every product, sum and quotient is one of the __f*_rn intrinsics, which the compiler never contracts into a fused
// multiply-add: results equal the CPU kernels' and the reference's bit for bit.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../launch.h"

namespace mdept {

constexpr int kThreads = 256;  // of every block
constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// N elements that lie beside each other. Moved by one access: see `read` and `write`.
template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// The hardware's accesses by their size; 32 bytes are one on sm_100 and two elsewhere.
template <int Bytes>
struct Access;
template <>
struct Access<1> {
  using Type = uint8_t;
};
template <>
struct Access<2> {
  using Type = uint16_t;
};
template <>
struct Access<4> {
  using Type = uint32_t;
};
template <>
struct Access<8> {
  using Type = uint2;
};
template <>
struct Access<16> {
  using Type = uint4;
};
template <>
struct Access<32> {
  using Type = Pack<float, 8>;
};

// The address has to be a multiple of the whole pack, which `aligned` checks before a kernel with packs is chosen.
template <int N, typename T>
__device__ __forceinline__ Pack<T, N> read(const T* from) {
  using Type = typename Access<sizeof(Pack<T, N>)>::Type;
  const Type bits = *reinterpret_cast<const Type*>(from);
  Pack<T, N> pack;
  memcpy(&pack, &bits, sizeof pack);
  return pack;
}
template <int N, typename T>
__device__ __forceinline__ void write(T* to, const Pack<T, N>& pack) {
  using Type = typename Access<sizeof(Pack<T, N>)>::Type;
  Type bits;
  memcpy(&bits, &pack, sizeof pack);
  // A plain assignment is often split into its elements again, each stored as soon as it is computed. Evicted first:
  // what a kernel writes is more than a cache holds.
  __stcs(reinterpret_cast<Type*>(to), bits);
}

template <typename T>
bool aligned(const T* address, int elements) {  // null is: it is not accessed
  return reinterpret_cast<uintptr_t>(address) % (sizeof(T) * static_cast<size_t>(elements)) == 0;
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// Round to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}

template <int N, typename T>
__device__ __forceinline__ Pack<float, N> load(const T* from) {
  const Pack<T, N> raw = read<N>(from);
  Pack<float, N> values;
#pragma unroll
  for (int i = 0; i < N; ++i) values.v[i] = to_float(raw.v[i]);
  return values;
}

template <int N, typename T>
__device__ __forceinline__ void store(T* to, const Pack<float, N>& values) {
  Pack<T, N> raw;
#pragma unroll
  for (int i = 0; i < N; ++i) raw.v[i] = from_float<T>(values.v[i]);
  write<N>(to, raw);
}

// One element of the outer step (dept/outer.py): Nesterov where there is momentum, else FedAvg.
__device__ __forceinline__ float outer_step(float value, float delta, float learning_rate) {
  return __fsub_rn(value, __fmul_rn(learning_rate, delta));
}
__device__ __forceinline__ float outer_step(float value, float delta, float learning_rate, float mu, float& momentum) {
  momentum = __fadd_rn(__fmul_rn(mu, momentum), delta);
  return __fsub_rn(value, __fmul_rn(learning_rate, __fadd_rn(__fmul_rn(mu, momentum), delta)));
}

// Launches `kernel` on as many blocks of kThreads as `blocks` asks for, at most as many as the device runs at once: the
// kernels stride over what is left. Nothing to do is no launch. Returns a cudaError_t.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int64_t blocks, void* stream, Arguments... arguments) {
  if (blocks <= 0) return cudaSuccess;
  int device = 0, processors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0);
  if (error != cudaSuccess) return error;
  const int64_t at_once = static_cast<int64_t>(processors) * (resident > 0 ? resident : 1);
  const unsigned grid = static_cast<unsigned>(blocks < at_once ? blocks : at_once);
#ifdef __CUDACC__
  kernel<<<grid, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
  static_cast<void>(stream);
  shim::launch(kernel, grid, kThreads, arguments...);
#endif
  return cudaGetLastError();
}

}  // namespace mdept
