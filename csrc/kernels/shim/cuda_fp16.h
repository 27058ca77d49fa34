// float16 for CUDA source on the CPU; see cuda_runtime.h of this folder.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16, magnitude = value.bits & 0x7fff;
  if (magnitude < 0x400) {  // zero and subnormal
    const float result = std::ldexp(static_cast<float>(magnitude), -24);
    return sign ? -result : result;
  }
  const uint32_t bits = sign | ((magnitude << 13) + (magnitude >= 0x7c00 ? 0x70000000u : 0x38000000u));
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline __half __float2half_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    return {0x7fff};
  } else if (magnitude >= 0x477ff000) {  // 65520 and more
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below the smallest normal number
    result = static_cast<uint32_t>(std::nearbyint(std::ldexp(std::fabs(value), 24)));
  } else {
    result = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}
