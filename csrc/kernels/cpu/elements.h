// What the CPU kernels share: one instruction set a processor, chosen as the program runs, and casts in plain arithmetic
// that the compiler turns into vectors of whichever it is.
#pragma once

#include <cstdint>
#include <cstring>

#include "launch.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define MDEPT_X86 1
#endif

// A kernel's loops are compiled once for each of these; the loader picks. Elsewhere (other processors, compilers and
// C libraries) they are compiled once, for the processor that the compiler is set to.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define MDEPT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
#ifndef MDEPT_CLONES
#define MDEPT_CLONES
#endif

// What a cloned function calls has to be part of it, or it would be compiled once, for the oldest processor.
#define MDEPT_INLINE inline __attribute__((always_inline))

namespace mdept {

MDEPT_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

MDEPT_INLINE float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

// Casts to nearest even, to and from. Both sides of every choice are computed, so that loops of them become vectors.
MDEPT_INLINE void cast(float from, float& to) { to = from; }

MDEPT_INLINE void cast(float from, Bf16& to) {
  const uint32_t bits = bits_of(from);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

MDEPT_INLINE void cast(float from, Fp16& to) {
  const uint32_t bits = bits_of(from), magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // fp16's smallest step is that of fp32 from 0.5 on: adding 0.5 rounds to it.
  const uint32_t denormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  to.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

MDEPT_INLINE float widened(float from) { return from; }

MDEPT_INLINE float widened(Bf16 from) { return float_of(static_cast<uint32_t>(from.bits) << 16); }

MDEPT_INLINE float widened(Fp16 from) {
  const uint32_t magnitude = from.bits & 0x7fffu, sign = static_cast<uint32_t>(from.bits & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t denormal = bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  uint32_t bits = magnitude < 0x400u ? denormal : normal;
  bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits;
  return float_of(bits | sign);
}

template <class To>
MDEPT_INLINE void cast_all(const float* __restrict from, To* __restrict to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) cast(from[i], to[i]);
}

#ifdef MDEPT_X86
// The processor's own rounding to fp16, which compilers do not find by themselves.
__attribute__((target("avx,f16c"))) inline void cast_all_f16c(const float* from, Fp16* to, int64_t size) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
  for (; i < size; ++i) to[i].bits = static_cast<uint16_t>(_cvtss_sh(from[i], 0));
}

MDEPT_INLINE void cast_all(const float* __restrict from, Fp16* __restrict to, int64_t size) {
  if (__builtin_cpu_supports("f16c")) return cast_all_f16c(from, to, size);
  for (int64_t i = 0; i < size; ++i) cast(from[i], to[i]);
}
#endif

// The outer step of one element (dept/outer.py): Nesterov with its momentum, or FedAvg.
MDEPT_INLINE float stepped(float value, float mean, float* momentum, float learning_rate, float mu) {
  if (momentum != nullptr) {
    *momentum = mu * *momentum + mean;
    mean = mu * *momentum + mean;
  }
  return value - learning_rate * mean;
}

// Calls work(begin, end) over [0, count) on the threads of `where`.
template <class Work>
void in_parallel(const MdeptWhere& where, int64_t count, int64_t grain, const Work& work) {
  if (count <= 0) return;
  where.parallel_for(
      0, count, grain < 1 ? 1 : grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Work*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&work)));
}

// Elements that are worth a thread of their own.
constexpr int64_t kGrain = 32768;

inline int64_t rows_at_once(int64_t hidden) { return hidden > 0 ? kGrain / hidden : kGrain; }

}  // namespace mdept
