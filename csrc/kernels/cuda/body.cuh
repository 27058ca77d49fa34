// Kernels on the flat body: pack a delta for the wire, mean of what arrived, outer step with the way back, apply.
//
// n elements, S silos. A warp works on one block of 256 elements at a time, 8 a lane; blocks are those of the int8
// format, which has a scale each. Layout of a wire row and its arithmetic: megatron_dept/ops/reference.py. An element
// is read and written by one thread; lanes meet only in the block's largest magnitude. Every kernel comes in two forms:
// packed, for whole blocks of arrays whose packs of 4 elements are aligned, and by single elements for the rest.

#pragma once

#include "common.cuh"

namespace mdept {

constexpr int kBlock = MDEPT_BLOCK;
constexpr int kEach = kBlock / kWarp;
enum Wire { kFp32 = MDEPT_WIRE_FP32, kBf16 = MDEPT_WIRE_BF16, kInt8 = MDEPT_WIRE_INT8 };

// One lane's elements of a block.
struct Tile {
  float x[kEach];
};

// Which element of the block is a lane's j-th. In packs of 4: 16 bytes of fp32, and a warp's access covers 512
// contiguous bytes. Singly: contiguous too.
template <bool kPacked>
__device__ __forceinline__ int element(int lane, int j) {
  return kPacked ? 4 * lane + (j & 3) + 128 * (j >> 2) : lane + kWarp * j;
}

__device__ __forceinline__ float widen(int8_t value) { return static_cast<float>(value); }
template <typename T>
__device__ __forceinline__ float widen(T value) {
  return to_float(value);
}
template <typename T>
__device__ __forceinline__ T narrow(float value) {
  return from_float<T>(value);
}
template <>
__device__ __forceinline__ int8_t narrow<int8_t>(float value) {
  return static_cast<int8_t>(static_cast<int>(value));
}

// `left` elements from `from` on, at most a block; what is past them reads as 0. Packed: exactly a block.
template <bool kPacked, typename T>
__device__ __forceinline__ Tile load_tile(const T* from, int lane, int left) {
  Tile tile;
  if constexpr (kPacked) {
#pragma unroll
    for (int p = 0; p < kEach; p += 4) {
      const Pack<T, 4> pack = read<4>(from + element<true>(lane, p));
#pragma unroll
      for (int e = 0; e < 4; ++e) tile.x[p + e] = widen(pack.v[e]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int at = element<false>(lane, j);
      tile.x[j] = at < left ? widen(from[at]) : 0.0f;
    }
  }
  return tile;
}

template <bool kPacked, typename T>
__device__ __forceinline__ void store_tile(T* to, const Tile& tile, int lane, int left) {
  if constexpr (kPacked) {
#pragma unroll
    for (int p = 0; p < kEach; p += 4) {
      Pack<T, 4> pack;
#pragma unroll
      for (int e = 0; e < 4; ++e) pack.v[e] = narrow<T>(tile.x[p + e]);
      write<4>(to + element<true>(lane, p), pack);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int at = element<false>(lane, j);
      if (at < left) to[at] = narrow<T>(tile.x[j]);
    }
  }
}

__device__ __forceinline__ void add(Tile& sum, const Tile& tile) {
#pragma unroll
  for (int j = 0; j < kEach; ++j) sum.x[j] = __fadd_rn(sum.x[j], tile.x[j]);
}

// Where the scales of an int8 row of n elements start: after the elements, at a multiple of 4 bytes.
__device__ __forceinline__ int64_t scales_at(int64_t n) { return (n + 3) / 4 * 4; }

// One lane's elements of a block as the wire has them: read first, made fp32 when they are used.
template <Wire kWire>
struct OnWire {
  using Type = float;
};
template <>
struct OnWire<kBf16> {
  using Type = __nv_bfloat16;
};
template <>
struct OnWire<kInt8> {
  using Type = int8_t;
};
template <Wire kWire>
struct Raw {
  Pack<typename OnWire<kWire>::Type, 4> packs[kEach / 4];
  float scale;
};

template <Wire kWire, bool kPacked>
__device__ __forceinline__ Raw<kWire> read_wire(const uint8_t* row, int64_t n, int64_t tile, int lane, int left) {
  using Type = typename OnWire<kWire>::Type;
  const Type* from = reinterpret_cast<const Type*>(row) + tile * kBlock;
  Raw<kWire> raw;
#pragma unroll
  for (int p = 0; p < kEach; p += 4) {
    if constexpr (kPacked) {
      raw.packs[p / 4] = read<4>(from + element<true>(lane, p));
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = element<false>(lane, p + e);
        raw.packs[p / 4].v[e] = at < left ? from[at] : narrow<Type>(0.0f);
      }
    }
  }
  raw.scale = kWire == kInt8 ? reinterpret_cast<const float*>(row + scales_at(n))[tile] : 1.0f;
  return raw;
}

template <Wire kWire>
__device__ __forceinline__ Tile decoded(const Raw<kWire>& raw) {
  Tile tile;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    tile.x[j] = widen(raw.packs[j / 4].v[j % 4]);
    if constexpr (kWire == kInt8) tile.x[j] = __fmul_rn(tile.x[j], raw.scale);
  }
  return tile;
}

// The larger of two magnitudes; NaN where one is.
__device__ __forceinline__ float larger(float a, float b) { return b > a || b != b ? b : a; }

// Block `tile` of a wire row from fp32. What the rounding left out goes to `residual` (int8 only, may be null). All
// lanes of the warp call it together.
template <Wire kWire, bool kPacked>
__device__ __forceinline__ void write_wire(Tile values, uint8_t* row, int64_t n, int64_t tile, int lane, int left,
                                           float* residual) {
  const int64_t at = tile * kBlock;
  if constexpr (kWire == kFp32) {
    store_tile<kPacked>(reinterpret_cast<float*>(row) + at, values, lane, left);
  } else if constexpr (kWire == kBf16) {
    store_tile<kPacked>(reinterpret_cast<__nv_bfloat16*>(row) + at, values, lane, left);
  } else {
    float largest = 0.0f;
#pragma unroll
    for (int j = 0; j < kEach; ++j) largest = larger(largest, fabsf(values.x[j]));
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2)
      largest = larger(largest, __shfl_xor_sync(kAllLanes, largest, apart));
    // A block that is not finite arrives as NaN, all of it.
    const float scale = isfinite(largest) ? __fdiv_rn(largest, 127.0f) : nanf("");
    const float inverse = largest == 0.0f ? 0.0f : __fdiv_rn(127.0f, largest);
    Tile rounded;
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const float nearest = rintf(__fmul_rn(values.x[j], inverse));
      // NaN: of such a block, or 0 * infinity where 127 / largest overflows.
      rounded.x[j] = nearest == nearest ? fminf(fmaxf(nearest, -127.0f), 127.0f) : 0.0f;
    }
    // Up to a multiple of 4 bytes the elements past the end, which are 0, are written too.
    store_tile<kPacked>(reinterpret_cast<int8_t*>(row) + at, rounded, lane, (left + 3) / 4 * 4);
    if (lane == 0) reinterpret_cast<float*>(row + scales_at(n))[tile] = scale;
    if (residual) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) values.x[j] = __fsub_rn(values.x[j], __fmul_rn(rounded.x[j], scale));
      store_tile<kPacked>(residual + at, values, lane, left);
    }
  }
}

// The mean of block `tile` over the silos' rows, summed in fp32 in silo order. The reads of several silos are in flight
// together.
template <Wire kWire, bool kPacked>
__device__ __forceinline__ Tile mean_of(const uint8_t* received, int64_t silos, int64_t row_bytes, float sources,
                                        int64_t n, int64_t tile, int lane, int left) {
  constexpr int kAhead = !kPacked ? 1 : kWire == kFp32 ? 2 : 3;
  Tile sum = decoded(read_wire<kWire, kPacked>(received, n, tile, lane, left));
#pragma unroll 1
  for (int64_t silo = 1; silo < silos; silo += kAhead) {
    Raw<kWire> raw[kAhead] = {};
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (silo + a < silos)
        raw[a] = read_wire<kWire, kPacked>(received + (silo + a) * row_bytes, n, tile, lane, left);
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (silo + a < silos) add(sum, decoded(raw[a]));
  }
#pragma unroll
  for (int j = 0; j < kEach; ++j) sum.x[j] = __fdiv_rn(sum.x[j], sources);
  return sum;
}

// Calls work(tile, lane, left) for every block of 256 in [first, end) that is this warp's; packed ones are all whole.
struct Tiles {
  int64_t n, first, end;
};
template <bool kPacked, typename Work>
__device__ __forceinline__ void for_each_tile(Tiles tiles, Work work) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / kWarp);
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * (kThreads / kWarp) + static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t tile = tiles.first + warp; tile < tiles.end; tile += warps) {
    const int64_t rest = kPacked ? kBlock : tiles.n - tile * kBlock;
    work(tile, lane, rest < kBlock ? static_cast<int>(rest) : kBlock);
  }
}

template <Wire kWire, bool kPacked>
__global__ void __launch_bounds__(kThreads, 4)
    body_pack(const float* __restrict__ value, const float* __restrict__ local, const float* __restrict__ carried,
              float* __restrict__ residual, uint8_t* __restrict__ out, Tiles tiles) {
  for_each_tile<kPacked>(tiles, [=](int64_t tile, int lane, int left) {
    const int64_t at = tile * kBlock;
    Tile delta = load_tile<kPacked>(value + at, lane, left), other = {}, before = {}, rest = {};
    if (local) other = load_tile<kPacked>(local + at, lane, left);
    if (carried) before = load_tile<kPacked>(carried + at, lane, left);
    if (kWire == kInt8 && residual) rest = load_tile<kPacked>(residual + at, lane, left);
    if (local) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) delta.x[j] = __fsub_rn(delta.x[j], other.x[j]);
    }
    if (carried) add(delta, before);
    if (kWire == kInt8 && residual) add(delta, rest);
    write_wire<kWire, kPacked>(delta, out, tiles.n, tile, lane, left, residual);
  });
}

template <Wire kWire, bool kPacked>
__global__ void __launch_bounds__(kThreads, 4)
    body_mean(const uint8_t* __restrict__ received, int64_t silos, int64_t row_bytes, float sources,
              float* __restrict__ out, Tiles tiles) {
  for_each_tile<kPacked>(tiles, [=](int64_t tile, int lane, int left) {
    store_tile<kPacked>(out + tile * kBlock,
                        mean_of<kWire, kPacked>(received, silos, row_bytes, sources, tiles.n, tile, lane, left), lane,
                        left);
  });
}

template <Wire kWire, bool kPacked>
__global__ void __launch_bounds__(kThreads, 3)
    body_unpack(const uint8_t* __restrict__ received, int64_t silos, int64_t row_bytes, float sources,
                const float* __restrict__ value, float* __restrict__ momentum, float learning_rate, float mu,
                uint8_t* __restrict__ back, float* __restrict__ residual, Tiles tiles) {
  for_each_tile<kPacked>(tiles, [=](int64_t tile, int lane, int left) {
    const int64_t at = tile * kBlock;
    const Tile old = load_tile<kPacked>(value + at, lane, left);
    Tile speed = {}, rest = {}, result;
    if (momentum) speed = load_tile<kPacked>(momentum + at, lane, left);
    const Tile mean = mean_of<kWire, kPacked>(received, silos, row_bytes, sources, tiles.n, tile, lane, left);
    // Not with the others: sm_80 would run out of registers while the silos are summed.
    if (kWire == kInt8 && residual) rest = load_tile<kPacked>(residual + at, lane, left);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      result.x[j] = momentum ? outer_step(old.x[j], mean.x[j], learning_rate, mu, speed.x[j])
                             : outer_step(old.x[j], mean.x[j], learning_rate);
      if constexpr (kWire != kFp32) result.x[j] = __fsub_rn(old.x[j], result.x[j]);
    }
    if (momentum) store_tile<kPacked>(momentum + at, speed, lane, left);
    if (kWire == kInt8 && residual) add(result, rest);
    write_wire<kWire, kPacked>(result, back, tiles.n, tile, lane, left, residual);
  });
}

// `low` is bf16 or, where `low_half`, fp16.
template <Wire kWire, bool kPacked>
__global__ void __launch_bounds__(kThreads, 4)
    body_apply(const uint8_t* __restrict__ back, float* __restrict__ value, float* __restrict__ master,
               void* __restrict__ low, bool low_half, Tiles tiles) {
  for_each_tile<kPacked>(tiles, [=](int64_t tile, int lane, int left) {
    const int64_t at = tile * kBlock;
    const Raw<kWire> sent = read_wire<kWire, kPacked>(back, tiles.n, tile, lane, left);
    Tile result = decoded(sent);
    if constexpr (kWire != kFp32) {
      const Tile old = load_tile<kPacked>(value + at, lane, left);
#pragma unroll
      for (int j = 0; j < kEach; ++j) result.x[j] = __fsub_rn(old.x[j], result.x[j]);
    }
    store_tile<kPacked>(value + at, result, lane, left);
    if (master) store_tile<kPacked>(master + at, result, lane, left);
    if (low && low_half) store_tile<kPacked>(static_cast<__half*>(low) + at, result, lane, left);
    if (low && !low_half) store_tile<kPacked>(static_cast<__nv_bfloat16*>(low) + at, result, lane, left);
  });
}

}  // namespace mdept
