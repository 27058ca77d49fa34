// Kernels with one mistake each, and sound ones beside them: what the thread shim has to tell apart.

#include "common.cuh"

using namespace mdept;

typedef struct {
  const float* in;  // [n], n = 256 unless said otherwise
  float* out;       // [n]
  int64_t n;
} Arguments;

namespace {

// out is in backwards, by way of shared memory.
template <bool kBarrier>
__global__ void reversed(const float* in, float* out) {
  __shared__ float staged[kThreads];
  staged[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = staged[kThreads - 1 - threadIdx.x];
  if (kBarrier) __syncthreads();
}

// out[t] = in[t + 1]; the last thread has no neighbour.
__global__ void reads_past_the_end(const float* in, float* out) { out[threadIdx.x] = in[threadIdx.x + 1]; }

__global__ void writes_past_the_end(const float* in, float* out, int64_t n) {
  for (int64_t i = threadIdx.x; i <= n; i += blockDim.x) out[i] = in[i < n ? i : 0];
}

__global__ void copies_packs(const float* in, float* out, int64_t n) {
  const int64_t i = 4 * static_cast<int64_t>(threadIdx.x);
  if (i + 4 <= n) store<4>(out + i, load<4>(in + i));
}

// out[0] = sum of in, in whatever order threads come.
__global__ void sums_as_they_come(const float* in, float* out) { atomicAdd(out, in[threadIdx.x]); }

// The same by shuffles, in one order.
template <unsigned kMask, bool kAll>
__global__ void sums_by_shuffles(const float* in, float* out) {
  float sum = in[threadIdx.x];
  if (kAll || threadIdx.x % 2) {
    for (int apart = kWarp / 2; apart > 0; apart /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(kMask, sum, apart));
  }
  out[threadIdx.x] = sum;
}

__global__ void some_skip_the_barrier(const float* in, float* out) {
  if (threadIdx.x < 100) __syncthreads();
  out[threadIdx.x] = in[threadIdx.x];
}

__global__ void counts_in_32_bits(const float* in, float* out, int rows) {
  const int row = 1 << 16, at = row * rows;
  out[threadIdx.x] = in[at < 0 ? 0 : at % rows];
}

}  // namespace

extern "C" {

#define FUNCTION(name, ...)                                                     \
  int name(const Arguments* a, const MdeptWhere* where) {                       \
    return launch(__VA_ARGS__); \
  }

FUNCTION(sound_barrier, reversed<true>, 1, where->stream, a->in, a->out)
FUNCTION(missing_barrier, reversed<false>, 1, where->stream, a->in, a->out)
FUNCTION(read_outside, reads_past_the_end, 1, where->stream, a->in, a->out)
FUNCTION(write_outside, writes_past_the_end, 1, where->stream, a->in, a->out, a->n)
FUNCTION(packs, copies_packs, 1, where->stream, a->in, a->out, a->n)
FUNCTION(atomics, sums_as_they_come, 1, where->stream, a->in, a->out)
FUNCTION(sound_shuffles, sums_by_shuffles<kAllLanes, true>, 1, where->stream, a->in, a->out)
FUNCTION(absent_lanes, sums_by_shuffles<kAllLanes, false>, 1, where->stream, a->in, a->out)
FUNCTION(narrow_mask, sums_by_shuffles<0xffffu, true>, 1, where->stream, a->in, a->out)
FUNCTION(divergent_barrier, some_skip_the_barrier, 1, where->stream, a->in, a->out)
FUNCTION(narrow_index, counts_in_32_bits, 1, where->stream, a->in, a->out, 1 << 16)

}
