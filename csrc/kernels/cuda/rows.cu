// Launches of the row kernels; what they take is in ../launch.h.

#include "rows.cuh"

namespace mdept {
namespace {

// Threads for a row of `packs` accesses: a warp, less for a short row; and more warps, where they divide it evenly, for
// one so long that a thread would have more than `each` accesses, the number that are in flight together.
int lanes_for(int64_t packs, int64_t each) {
  int lanes = kWarp;
  while (lanes > 1 && lanes / 2 >= packs) lanes /= 2;
  while (lanes < kThreads && packs % (lanes * 2) == 0 && packs / lanes > each) lanes *= 2;
  return lanes;
}

int64_t blocks_for(int64_t groups, int lanes) {
  const int64_t each = kThreads / lanes;
  return (groups + each - 1) / each;
}

template <typename Out>
int lookup(const float* table, int64_t rows, int64_t hidden, const int64_t* ids, int64_t count,
           const int32_t* local_of, int64_t start, const float* position, int64_t sequence, void* to, void* stream) {
  constexpr int kPack = 16 / sizeof(Out);  // stores of 16 bytes
  Out* out = static_cast<Out*>(to);
  const bool packed = hidden % kPack == 0 && aligned(table, kPack) && aligned(position, kPack) && aligned(out, kPack);
  const int lanes = lanes_for(packed ? hidden / kPack : hidden, kPack == 8 ? 3 : 4);
  return launch(packed ? lookup_rows<Out, kPack> : lookup_rows<Out, 1>, hidden ? blocks_for(count, lanes) : 0, stream,
                table, rows, hidden, ids, count, local_of, start, position, sequence, out, lanes);
}

int lookup_of(int32_t dtype, const float* table, int64_t rows, int64_t hidden, const int64_t* ids, int64_t count,
              const int32_t* local_of, int64_t start, const float* position, int64_t sequence, void* out,
              void* stream) {
  const auto chosen = dtype == MDEPT_FP32   ? lookup<float>
                      : dtype == MDEPT_BF16 ? lookup<__nv_bfloat16>
                      : dtype == MDEPT_FP16 ? lookup<__half>
                                            : nullptr;
  if (!chosen) return cudaErrorInvalidValue;
  return chosen(table, rows, hidden, ids, count, local_of, start, position, sequence, out, stream);
}

template <typename Delta>
int scatter(const MdeptTrimScatterMean& a, void* stream) {
  const Delta* deltas = static_cast<const Delta*>(a.deltas);
  const bool packed = a.h % 4 == 0 && aligned(a.table, 4) && aligned(a.momentum, 4) && aligned(deltas, 4);
  const int64_t packs = packed ? a.h / 4 : a.h;
  // Never more than a warp: a row's indices are read first, and more rows at once hide that better than more lanes.
  const int lanes = lanes_for(packs, packs);
  return launch(packed ? scatter_mean<Delta, 4> : scatter_mean<Delta, 1>, a.h ? blocks_for(a.k, lanes) : 0, stream,
                a.table, a.momentum, a.h, a.rows, a.k, a.starts, a.order, deltas, a.counts, a.learning_rate, a.mu,
                lanes);
}

// Sums of the rows that starts and order list, or, without an order, of rows u, u + count, ...: `repeats` of them.
template <typename In>
int sum(const void* from, int64_t hidden, const int64_t* starts, const int64_t* order, int64_t count, int64_t repeats,
        float* out, void* stream) {
  const In* in = static_cast<const In*>(from);
  const bool packed = hidden % 4 == 0 && aligned(in, 4) && aligned(out, 4);
  const int64_t packs = packed ? hidden / 4 : hidden;
  const int lanes = lanes_for(packs, packs);
  return launch(packed ? sum_rows<In, 4> : sum_rows<In, 1>, blocks_for(count * ((packs + lanes - 1) / lanes), lanes),
                stream, in, hidden, starts, order, count, repeats, out, lanes);
}

template <typename In>
int backward(const MdeptRemapBackward& a, void* stream) {
  const int error = sum<In>(a.grad, a.h, a.starts, a.order, a.u, 0, a.grad_rows, stream);
  if (error != cudaSuccess || !a.grad_position) return error;
  const int64_t rest = (a.positions - a.s) * a.h;
  if (rest > 0) {
    const cudaError_t cleared =
        cudaMemsetAsync(a.grad_position + a.s * a.h, 0, static_cast<size_t>(rest) * sizeof(float),
                        static_cast<cudaStream_t>(stream));
    if (cleared != cudaSuccess) return cleared;
  }
  return sum<In>(a.grad, a.h, nullptr, nullptr, a.s, a.b, a.grad_position, stream);
}

}  // namespace
}  // namespace mdept

using namespace mdept;

const char* mdept_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int mdept_trim_gather_cuda(const MdeptTrimGather* a, const MdeptWhere* where) {
  return lookup_of(a->dtype, a->table, a->n, a->h, a->ids, a->k, nullptr, a->first, nullptr, 1, a->out, where->stream);
}

int mdept_remap_lookup_cuda(const MdeptRemapLookup* a, const MdeptWhere* where) {
  return lookup_of(a->dtype, a->table, a->v, a->h, a->ids, a->b * a->s, a->local_of, a->start, a->position, a->s,
                   a->out, where->stream);
}

int mdept_trim_scatter_mean_cuda(const MdeptTrimScatterMean* a, const MdeptWhere* where) {
  if (a->dtype == MDEPT_FP32) return scatter<float>(*a, where->stream);
  if (a->dtype == MDEPT_BF16) return scatter<__nv_bfloat16>(*a, where->stream);
  if (a->dtype == MDEPT_FP16) return scatter<__half>(*a, where->stream);
  return cudaErrorInvalidValue;
}

int mdept_remap_backward_cuda(const MdeptRemapBackward* a, const MdeptWhere* where) {
  if (a->dtype == MDEPT_FP32) return backward<float>(*a, where->stream);
  if (a->dtype == MDEPT_BF16) return backward<__nv_bfloat16>(*a, where->stream);
  if (a->dtype == MDEPT_FP16) return backward<__half>(*a, where->stream);
  return cudaErrorInvalidValue;
}
