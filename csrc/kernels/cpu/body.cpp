// The body's outer exchange on the CPU: packed, averaged and stepped, applied; a block of 256 elements at a time, so
// that what lies between reading and writing stays in registers and the nearest cache. See launch.h.

#include <limits>

#include "elements.h"

namespace mdept {
namespace {

constexpr int64_t kBlock = MDEPT_BLOCK;
constexpr float kLargest = 127.0f;
// Added to a number of less than 2^22, it leaves the nearest integer (ties to even) in the low bits of the mantissa.
constexpr float kRounder = 12582912.0f;

int64_t blocks_of(int64_t n) { return (n + kBlock - 1) / kBlock; }

MDEPT_INLINE const float* scales_of(const void* packed, int64_t n) {
  return reinterpret_cast<const float*>(static_cast<const char*>(packed) + (n + 3) / 4 * 4);
}

// One block in fp32 and where it stands: elements [first, first + size) of n.
struct Block {
  int64_t index, first, size;
};

MDEPT_INLINE Block block_at(int64_t index, int64_t n) {
  const int64_t first = index * kBlock;
  return {index, first, n - first < kBlock ? n - first : kBlock};
}

// x * inverse, within [-127, 127], rounded; a NaN, of 0 * inf, becomes 0.
MDEPT_INLINE float quantised(float x, float inverse) {
  float y = x * inverse;
  y = y > kLargest ? kLargest : y;
  y = y < -kLargest ? -kLargest : y;
  y = y == y ? y : 0.0f;
  return (y + kRounder) - kRounder;
}

MDEPT_INLINE float pack_int8(const float* __restrict x, int8_t* __restrict to, float* __restrict residual, int64_t size) {
  uint32_t largest_bits = 0;
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = bits_of(x[i]) & 0x7fffffffu;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  const bool finite = largest_bits < 0x7f800000u;
  const float largest = float_of(largest_bits);
  const float scale = finite ? largest / kLargest : std::numeric_limits<float>::quiet_NaN();
  const float inverse = finite && largest != 0 ? kLargest / largest : 0.0f;
  if (residual != nullptr) {
    for (int64_t i = 0; i < size; ++i) {
      const float q = quantised(x[i], inverse);
      to[i] = static_cast<int8_t>(static_cast<int32_t>(q));
      residual[i] = x[i] - q * scale;
    }
  } else {
    for (int64_t i = 0; i < size; ++i) to[i] = static_cast<int8_t>(static_cast<int32_t>(quantised(x[i], inverse)));
  }
  return scale;
}

// One block into its place on the wire; int8 adds the residual first.
MDEPT_INLINE void pack(float* __restrict x, const Block& block, int64_t n, int32_t wire, void* out, float* residual) {
  if (wire == MDEPT_WIRE_FP32) {
    float* to = static_cast<float*>(out) + block.first;
    for (int64_t i = 0; i < block.size; ++i) to[i] = x[i];
  } else if (wire == MDEPT_WIRE_BF16) {
    cast_all(x, static_cast<Bf16*>(out) + block.first, block.size);
  } else {
    float* left = residual == nullptr ? nullptr : residual + block.first;
    if (left != nullptr)
      for (int64_t i = 0; i < block.size; ++i) x[i] = x[i] + left[i];
    const float scale = pack_int8(x, static_cast<int8_t*>(out) + block.first, left, block.size);
    const_cast<float*>(scales_of(out, n))[block.index] = scale;
  }
}

MDEPT_INLINE void end_int8(void* out, int64_t n, int32_t wire) {
  if (wire == MDEPT_WIRE_INT8)
    for (int64_t i = n; i < (n + 3) / 4 * 4; ++i) static_cast<int8_t*>(out)[i] = 0;
}

// combine(i, element) for each element of a block of the wire.
template <class Combine>
MDEPT_INLINE void unpack(const void* packed, const Block& block, int64_t n, int32_t wire, const Combine& combine) {
  if (wire == MDEPT_WIRE_FP32) {
    const float* from = static_cast<const float*>(packed) + block.first;
    for (int64_t i = 0; i < block.size; ++i) combine(i, from[i]);
  } else if (wire == MDEPT_WIRE_BF16) {
    const Bf16* from = static_cast<const Bf16*>(packed) + block.first;
    for (int64_t i = 0; i < block.size; ++i) combine(i, widened(from[i]));
  } else {
    const int8_t* from = static_cast<const int8_t*>(packed) + block.first;
    const float scale = scales_of(packed, n)[block.index];
    for (int64_t i = 0; i < block.size; ++i) combine(i, static_cast<float>(from[i]) * scale);
  }
}

template <class Received>
MDEPT_INLINE void mean_of(const Received& a, const Block& block, float* __restrict mean) {
  const char* packed = static_cast<const char*>(a.received);
  unpack(packed, block, a.n, a.wire, [mean](int64_t i, float element) { mean[i] = element; });
  for (int64_t silo = 1; silo < a.silos; ++silo)
    unpack(packed + silo * a.bytes, block, a.n, a.wire, [mean](int64_t i, float element) { mean[i] += element; });
  const float sources = static_cast<float>(a.sources);
  for (int64_t i = 0; i < block.size; ++i) mean[i] = mean[i] / sources;
}

MDEPT_INLINE void delta_of(const MdeptBodyPack& a, const Block& block, float* __restrict delta) {
  const float* __restrict value = a.value + block.first;
  if (a.local == nullptr) {
    for (int64_t i = 0; i < block.size; ++i) delta[i] = value[i];
  } else {
    const float* __restrict local = a.local + block.first;
    for (int64_t i = 0; i < block.size; ++i) delta[i] = value[i] - local[i];
  }
  if (a.carried != nullptr) {
    const float* __restrict carried = a.carried + block.first;
    for (int64_t i = 0; i < block.size; ++i) delta[i] = carried[i] + delta[i];
  }
}

MDEPT_CLONES void pack_blocks(const MdeptBodyPack& a, int64_t begin, int64_t end) {
  float delta[kBlock];
  for (int64_t index = begin; index < end; ++index) {
    const Block block = block_at(index, a.n);
    delta_of(a, block, delta);
    pack(delta, block, a.n, a.wire, a.out, a.residual);
  }
}

MDEPT_CLONES void mean_blocks(const MdeptBodyMean& a, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Block block = block_at(index, a.n);
    mean_of(a, block, a.out + block.first);
  }
}

MDEPT_CLONES void unpack_blocks(const MdeptBodyUnpack& a, int64_t begin, int64_t end) {
  float mean[kBlock];
  const float learning_rate = a.learning_rate, mu = a.mu;
  for (int64_t index = begin; index < end; ++index) {
    const Block block = block_at(index, a.n);
    mean_of(a, block, mean);
    const float* __restrict value = a.value + block.first;
    if (a.momentum != nullptr) {
      float* __restrict momentum = a.momentum + block.first;
      for (int64_t i = 0; i < block.size; ++i)
        mean[i] = stepped(value[i], mean[i], momentum + i, learning_rate, mu);
    } else {
      for (int64_t i = 0; i < block.size; ++i) mean[i] = stepped(value[i], mean[i], nullptr, learning_rate, mu);
    }
    if (a.wire != MDEPT_WIRE_FP32)
      for (int64_t i = 0; i < block.size; ++i) mean[i] = value[i] - mean[i];
    pack(mean, block, a.n, a.wire, a.back, a.back_residual);
  }
}

MDEPT_CLONES void apply_blocks(const MdeptBodyApply& a, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    const Block block = block_at(index, a.n);
    float* __restrict value = a.value + block.first;
    if (a.wire == MDEPT_WIRE_FP32)
      unpack(a.back, block, a.n, a.wire, [value](int64_t i, float element) { value[i] = element; });
    else
      unpack(a.back, block, a.n, a.wire, [value](int64_t i, float element) { value[i] = value[i] - element; });
    if (a.master != nullptr) cast_all(value, a.master + block.first, block.size);
    if (a.low == nullptr) continue;
    if (a.low_dtype == MDEPT_BF16)
      cast_all(value, static_cast<Bf16*>(a.low) + block.first, block.size);
    else
      cast_all(value, static_cast<Fp16*>(a.low) + block.first, block.size);
  }
}

}  // namespace
}  // namespace mdept

using mdept::blocks_of;
using mdept::in_parallel;

static constexpr int64_t kBlocksAtOnce = mdept::kGrain / MDEPT_BLOCK;

int mdept_body_pack_cpu(const MdeptBodyPack* a, const MdeptWhere* where) {
  in_parallel(*where, blocks_of(a->n), kBlocksAtOnce, [a](int64_t begin, int64_t end) {
    mdept::pack_blocks(*a, begin, end);
  });
  mdept::end_int8(a->out, a->n, a->wire);
  return 0;
}

int mdept_body_mean_cpu(const MdeptBodyMean* a, const MdeptWhere* where) {
  in_parallel(*where, blocks_of(a->n), kBlocksAtOnce, [a](int64_t begin, int64_t end) {
    mdept::mean_blocks(*a, begin, end);
  });
  return 0;
}

int mdept_body_unpack_cpu(const MdeptBodyUnpack* a, const MdeptWhere* where) {
  in_parallel(*where, blocks_of(a->n), kBlocksAtOnce, [a](int64_t begin, int64_t end) {
    mdept::unpack_blocks(*a, begin, end);
  });
  mdept::end_int8(a->back, a->n, a->wire);
  return 0;
}

int mdept_body_apply_cpu(const MdeptBodyApply* a, const MdeptWhere* where) {
  in_parallel(*where, blocks_of(a->n), kBlocksAtOnce, [a](int64_t begin, int64_t end) {
    mdept::apply_blocks(*a, begin, end);
  });
  return 0;
}
