// Launches of the body kernels; what they take is in ../launch.h.

#include "body.cuh"

namespace mdept {
namespace {

// Two launches where arrays are aligned: the whole blocks of 256 elements, and what is left; else one for all.
template <typename... Parameters, typename... Arguments>
int launch_tiles(void (*packed)(Parameters...), void (*single)(Parameters...), bool aligned, int64_t n, void* stream,
                 Arguments... arguments) {
  constexpr int64_t kWarps = kThreads / kWarp;
  const int64_t whole = aligned ? n / kBlock : 0, all = (n + kBlock - 1) / kBlock;
  const int error = launch(packed, (whole + kWarps - 1) / kWarps, stream, arguments..., Tiles{n, 0, whole});
  if (error != cudaSuccess) return error;
  return launch(single, (all - whole + kWarps - 1) / kWarps, stream, arguments..., Tiles{n, whole, all});
}

// Whether packs of 4 elements can be taken everywhere in wire rows of which the first starts here, `bytes` apart.
template <Wire kWire>
bool aligned_wire(const void* rows, int64_t bytes) {
  constexpr uintptr_t kPackBytes = kWire == kFp32 ? 16 : kWire == kBf16 ? 8 : 4;
  return reinterpret_cast<uintptr_t>(rows) % kPackBytes == 0 && static_cast<uintptr_t>(bytes) % kPackBytes == 0;
}

template <Wire kWire>
int pack(const MdeptBodyPack& a, void* stream) {
  const bool packed = aligned(a.value, 4) && aligned(a.local, 4) && aligned(a.carried, 4) && aligned(a.residual, 4) &&
                      aligned_wire<kWire>(a.out, 0);
  return launch_tiles(body_pack<kWire, true>, body_pack<kWire, false>, packed, a.n, stream, a.value, a.local, a.carried,
                      a.residual, static_cast<uint8_t*>(a.out));
}

template <Wire kWire>
int mean(const MdeptBodyMean& a, void* stream) {
  const bool packed = aligned(a.out, 4) && aligned_wire<kWire>(a.received, a.silos > 1 ? a.bytes : 0);
  return launch_tiles(body_mean<kWire, true>, body_mean<kWire, false>, packed, a.n, stream,
                      static_cast<const uint8_t*>(a.received), a.silos, a.bytes, static_cast<float>(a.sources), a.out);
}

template <Wire kWire>
int unpack(const MdeptBodyUnpack& a, void* stream) {
  const bool packed = aligned(a.value, 4) && aligned(a.momentum, 4) && aligned(a.back_residual, 4) &&
                      aligned_wire<kWire>(a.back, 0) && aligned_wire<kWire>(a.received, a.silos > 1 ? a.bytes : 0);
  return launch_tiles(body_unpack<kWire, true>, body_unpack<kWire, false>, packed, a.n, stream,
                      static_cast<const uint8_t*>(a.received), a.silos, a.bytes, static_cast<float>(a.sources), a.value,
                      a.momentum, a.learning_rate, a.mu, static_cast<uint8_t*>(a.back), a.back_residual);
}

template <Wire kWire>
int apply(const MdeptBodyApply& a, void* stream) {
  const bool packed = aligned(a.value, 4) && aligned(a.master, 4) && aligned(static_cast<const uint16_t*>(a.low), 4) &&
                      aligned_wire<kWire>(a.back, 0);
  return launch_tiles(body_apply<kWire, true>, body_apply<kWire, false>, packed, a.n, stream,
                      static_cast<const uint8_t*>(a.back), a.value, a.master, a.low, a.low_dtype == MDEPT_FP16);
}

}  // namespace
}  // namespace mdept

using namespace mdept;

#define MDEPT_BY_WIRE(name, work, Arguments)                              \
  int mdept_##name##_cuda(const Arguments* a, const MdeptWhere* where) {  \
    if (a->wire == kFp32) return work<kFp32>(*a, where->stream);          \
    if (a->wire == kBf16) return work<kBf16>(*a, where->stream);          \
    if (a->wire == kInt8) return work<kInt8>(*a, where->stream);          \
    return cudaErrorInvalidValue;                                         \
  }

MDEPT_BY_WIRE(body_pack, pack, MdeptBodyPack)
MDEPT_BY_WIRE(body_mean, mean, MdeptBodyMean)
MDEPT_BY_WIRE(body_unpack, unpack, MdeptBodyUnpack)
MDEPT_BY_WIRE(body_apply, apply, MdeptBodyApply)
