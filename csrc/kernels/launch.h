// The kernels as the binding calls them: plain C, raw pointers, no torch. One declaration serves CPU and CUDA.
//
// What each computes, to the bit, is megatron_dept/ops/reference.py. All of them: every multiplication, addition and
// division rounded by itself (no fused multiply-add), casts to nearest even, sums in the stated order. Pointers are
// aligned to their element and to nothing more; sizes may be 0; pointers said to be "or null" stand for an absent
// argument. Row numbers come checked by the binding, except where outside is said to mean something.
//
// Letters: n elements or rows, h hidden, k ids, m delta rows, b batch, s sequence, u rows touched, S silos, L positions.
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { MDEPT_FP32 = 0, MDEPT_BF16 = 1, MDEPT_FP16 = 2 };  // element types of rows, deltas, gradients
enum { MDEPT_WIRE_FP32 = 0, MDEPT_WIRE_BF16 = 1, MDEPT_WIRE_INT8 = 2 };
enum { MDEPT_BLOCK = 256 };  // elements that share a scale on the int8 wire

// Where a kernel runs. On the CPU `parallel_for` calls task(begin, end, context) over parts of [begin, end) of at
// least `grain`, on threads of the caller's choice, and returns when all are done; on CUDA `stream` is a cudaStream_t.
typedef void (*MdeptTask)(int64_t begin, int64_t end, void* context);
typedef struct {
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, MdeptTask task, void* context);
  void* stream;
} MdeptWhere;

// out[i] = table[ids[i] - first] cast, zeros where that is outside [0, n).
typedef struct {
  const float* table;  // [n, h]
  int64_t n, h;
  const int64_t* ids;  // [k]
  int64_t k;
  int64_t first;
  void* out;  // [k, h] of dtype
  int32_t dtype;
} MdeptTrimGather;

// For each u: d = (0 + deltas[order[starts[u]]] + ... ) / counts[u]; outer step of row rows[u] with d.
typedef struct {
  float* table;     // [n, h]
  float* momentum;  // [n, h] or null: FedAvg
  int64_t n, h;
  const int64_t* rows;    // [k], unique, within [0, n)
  const int64_t* starts;  // [k + 1], ascending from 0
  const int64_t* order;   // [starts[k]], within [0, m)
  int64_t k;
  const void* deltas;  // [m, h] of dtype
  int64_t m;
  int32_t dtype;
  const int32_t* counts;  // [k], at least 1
  float learning_rate, mu;
} MdeptTrimScatterMean;

// out[b, s] = table[local_of[ids[b, s]] - start] (zeros outside [0, v)) + position[s], cast.
typedef struct {
  const int64_t* ids;       // [b, s], within [0, V) where local_of is given
  const int32_t* local_of;  // [V] or null: ids are local rows already
  int64_t b, s;
  const float* table;  // [v, h]
  int64_t v, h;
  const float* position;  // [L, h], L >= s, or null
  int64_t start;
  void* out;  // [b, s, h] of dtype
  int32_t dtype;
} MdeptRemapLookup;

// grad_rows[u] = 0 + grad[order[starts[u]]] + ..., in that order, which ascends within a row: the look-up's gradient,
// grouped by row beforehand; no two groups name one row of grad.
// grad_position[t] = 0 + grad[0, t] + grad[1, t] + ... for t < s, zeros for s <= t < positions.
typedef struct {
  const void* grad;  // [b, s, h] of dtype; order counts its rows, b * s of them
  int32_t dtype;
  int64_t b, s, h;
  const int64_t* starts;  // [u + 1]
  const int64_t* order;   // [starts[u]], within [0, b * s)
  int64_t u;
  float* grad_rows;      // [u, h]
  float* grad_position;  // [positions, h] or null
  int64_t positions;
} MdeptRemapBackward;

// delta = value - local (value alone without local), then carried + delta, then for int8 + residual; packed into out.
typedef struct {
  const float* value;    // [n]
  const float* local;    // [n] or null
  const float* carried;  // [n] or null
  float* residual;       // [n] or null; int8 only, in place
  int64_t n;
  int32_t wire;
  void* out;  // aligned to 4 bytes (2 on a bf16 wire); int8: n bytes, zeros up to a multiple of 4, fp32 scales
} MdeptBodyPack;

// out = (received[0] + received[1] + ...) / sources, the first taken as it is.
typedef struct {
  const void* received;  // [S, bytes], rows aligned as MdeptBodyPack.out
  int64_t silos;
  int64_t bytes;  // of one silo's row
  int64_t sources;
  int64_t n;
  int32_t wire;
  float* out;  // [n]
} MdeptBodyMean;

// mean as above; outer step of value, which is not written; back = the new value (fp32) or value - new packed.
typedef struct {
  const void* received;
  int64_t silos;
  int64_t bytes;
  int64_t sources;
  int64_t n;
  int32_t wire;
  const float* value;  // [n]
  float* momentum;     // [n] or null: FedAvg; in place
  float learning_rate, mu;
  void* back;
  float* back_residual;  // [n] or null; int8 only, in place
} MdeptBodyUnpack;

// value = back (fp32) or value - back's delta; master = value, low = value cast.
typedef struct {
  const void* back;
  int64_t n;
  int32_t wire;
  float* value;      // [n]
  float* master;     // [n] or null
  void* low;         // [n] of low_dtype, or null
  int32_t low_dtype;  // bf16 or fp16
} MdeptBodyApply;

// Each returns 0, or what cudaGetLastError said after the launch; the CPU ones always 0.
#define MDEPT_KERNEL(name, Arguments)                              \
  int mdept_##name##_cpu(const Arguments*, const MdeptWhere*);     \
  int mdept_##name##_cuda(const Arguments*, const MdeptWhere*);

MDEPT_KERNEL(trim_gather, MdeptTrimGather)
MDEPT_KERNEL(trim_scatter_mean, MdeptTrimScatterMean)
MDEPT_KERNEL(remap_lookup, MdeptRemapLookup)
MDEPT_KERNEL(remap_backward, MdeptRemapBackward)
MDEPT_KERNEL(body_pack, MdeptBodyPack)
MDEPT_KERNEL(body_mean, MdeptBodyMean)
MDEPT_KERNEL(body_unpack, MdeptBodyUnpack)
MDEPT_KERNEL(body_apply, MdeptBodyApply)

#undef MDEPT_KERNEL

// What a CUDA kernel's return means, in words.
const char* mdept_cuda_error(int error);

#ifdef __cplusplus
}
#endif
