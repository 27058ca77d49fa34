// Rows of a table on the CPU: gathered, averaged back, looked up, and the look-up's gradient; see launch.h.

#include "elements.h"

namespace mdept {
namespace {

// A row is worked on in parts of so many elements, which stay in the processor's nearest cache.
constexpr int64_t kPart = 1024;

// Lines of the next row asked for while this one is copied: the rest the processor foresees itself.
MDEPT_INLINE void prefetch_row(const float* row) {
  for (int line = 0; line < 4; ++line) __builtin_prefetch(row + 16 * line);
}

template <class To>
MDEPT_INLINE void copy_row(const float* __restrict from, To* __restrict to, int64_t h) {
  for (int64_t i = 0; i < h; ++i) cast(from[i], to[i]);
}

template <class To>
MDEPT_INLINE void gather_as(const MdeptTrimGather& a, int64_t begin, int64_t end) {
  To* out = static_cast<To*>(a.out);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = a.ids[i] - a.first;
    if (i + 1 < end) {
      const int64_t next = a.ids[i + 1] - a.first;
      if (next >= 0 && next < a.n) prefetch_row(a.table + next * a.h);
    }
    if (row < 0 || row >= a.n)
      std::memset(out + i * a.h, 0, a.h * sizeof(To));
    else
      copy_row(a.table + row * a.h, out + i * a.h, a.h);
  }
}

template <class From>
MDEPT_INLINE void add_part(float* __restrict sum, const From* __restrict part, int64_t size) {
  for (int64_t i = 0; i < size; ++i) sum[i] += widened(part[i]);
}

// sum = 0 + rows[order[begin]] + rows[order[begin + 1]] + ..., the part of `size` elements from `offset` on.
template <class From>
MDEPT_INLINE void sum_part(
    float* sum, const From* rows, const int64_t* order, int64_t begin, int64_t end, int64_t h, int64_t offset,
    int64_t size) {
  for (int64_t i = 0; i < size; ++i) sum[i] = 0.0f;
  for (int64_t j = begin; j < end; ++j) add_part(sum, rows + order[j] * h + offset, size);
}

MDEPT_INLINE void step_part(
    float* __restrict value, float* __restrict momentum, const float* __restrict sum, float count, float learning_rate,
    float mu, int64_t size) {
  if (momentum != nullptr)
    for (int64_t i = 0; i < size; ++i) value[i] = stepped(value[i], sum[i] / count, momentum + i, learning_rate, mu);
  else
    for (int64_t i = 0; i < size; ++i) value[i] = stepped(value[i], sum[i] / count, nullptr, learning_rate, mu);
}

template <class From>
MDEPT_INLINE void scatter_as(const MdeptTrimScatterMean& a, int64_t begin, int64_t end) {
  float sum[kPart];
  for (int64_t u = begin; u < end; ++u)
    for (int64_t offset = 0; offset < a.h; offset += kPart) {
      const int64_t size = a.h - offset < kPart ? a.h - offset : kPart;
      const int64_t place = a.rows[u] * a.h + offset;
      sum_part(sum, static_cast<const From*>(a.deltas), a.order, a.starts[u], a.starts[u + 1], a.h, offset, size);
      step_part(
          a.table + place, a.momentum == nullptr ? nullptr : a.momentum + place, sum, static_cast<float>(a.counts[u]),
          a.learning_rate, a.mu, size);
    }
}

template <class To>
MDEPT_INLINE void copy_sum(const float* __restrict row, const float* __restrict position, To* __restrict to, int64_t h) {
  for (int64_t i = 0; i < h; ++i) cast(row[i] + position[i], to[i]);
}

template <class To>
MDEPT_INLINE void add_nothing(const float* __restrict position, To* __restrict to, int64_t h) {
  for (int64_t i = 0; i < h; ++i) cast(0.0f + position[i], to[i]);
}

template <class To>
MDEPT_INLINE void look_up_as(const MdeptRemapLookup& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t id = a.ids[token];
    const int64_t row = (a.local_of == nullptr ? id : a.local_of[id]) - a.start;
    const bool inside = row >= 0 && row < a.v;
    To* to = static_cast<To*>(a.out) + token * a.h;
    const float* position = a.position == nullptr ? nullptr : a.position + token % a.s * a.h;
    if (inside && position != nullptr)
      copy_sum(a.table + row * a.h, position, to, a.h);
    else if (inside)
      copy_row(a.table + row * a.h, to, a.h);
    else if (position != nullptr)
      add_nothing(position, to, a.h);
    else
      std::memset(to, 0, a.h * sizeof(To));
  }
}

template <class From>
MDEPT_INLINE void backward_as(const MdeptRemapBackward& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u)
    sum_part(
        a.grad_rows + u * a.h, static_cast<const From*>(a.grad), a.order, a.starts[u], a.starts[u + 1], a.h, 0, a.h);
}

template <class From>
MDEPT_INLINE void position_as(const MdeptRemapBackward& a, int64_t begin, int64_t end) {
  const From* grad = static_cast<const From*>(a.grad);
  for (int64_t t = begin; t < end; ++t) {
    float* sum = a.grad_position + t * a.h;
    for (int64_t i = 0; i < a.h; ++i) sum[i] = 0.0f;
    if (t < a.s)
      for (int64_t b = 0; b < a.b; ++b) add_part(sum, grad + (b * a.s + t) * a.h, a.h);
  }
}

MDEPT_CLONES void gather(const MdeptTrimGather& a, int64_t begin, int64_t end) {
  if (a.dtype == MDEPT_BF16) return gather_as<Bf16>(a, begin, end);
  if (a.dtype == MDEPT_FP16) return gather_as<Fp16>(a, begin, end);
  gather_as<float>(a, begin, end);
}

MDEPT_CLONES void scatter(const MdeptTrimScatterMean& a, int64_t begin, int64_t end) {
  if (a.dtype == MDEPT_BF16) return scatter_as<Bf16>(a, begin, end);
  if (a.dtype == MDEPT_FP16) return scatter_as<Fp16>(a, begin, end);
  scatter_as<float>(a, begin, end);
}

MDEPT_CLONES void look_up(const MdeptRemapLookup& a, int64_t begin, int64_t end) {
  if (a.dtype == MDEPT_BF16) return look_up_as<Bf16>(a, begin, end);
  if (a.dtype == MDEPT_FP16) return look_up_as<Fp16>(a, begin, end);
  look_up_as<float>(a, begin, end);
}

MDEPT_CLONES void backward(const MdeptRemapBackward& a, int64_t begin, int64_t end) {
  if (a.dtype == MDEPT_BF16) return backward_as<Bf16>(a, begin, end);
  if (a.dtype == MDEPT_FP16) return backward_as<Fp16>(a, begin, end);
  backward_as<float>(a, begin, end);
}

MDEPT_CLONES void backward_of_positions(const MdeptRemapBackward& a, int64_t begin, int64_t end) {
  if (a.dtype == MDEPT_BF16) return position_as<Bf16>(a, begin, end);
  if (a.dtype == MDEPT_FP16) return position_as<Fp16>(a, begin, end);
  position_as<float>(a, begin, end);
}

}  // namespace
}  // namespace mdept

using mdept::in_parallel;
using mdept::rows_at_once;

int mdept_trim_gather_cpu(const MdeptTrimGather* a, const MdeptWhere* where) {
  in_parallel(*where, a->k, rows_at_once(a->h), [a](int64_t begin, int64_t end) { mdept::gather(*a, begin, end); });
  return 0;
}

int mdept_trim_scatter_mean_cpu(const MdeptTrimScatterMean* a, const MdeptWhere* where) {
  in_parallel(*where, a->k, rows_at_once(a->h), [a](int64_t begin, int64_t end) { mdept::scatter(*a, begin, end); });
  return 0;
}

int mdept_remap_lookup_cpu(const MdeptRemapLookup* a, const MdeptWhere* where) {
  in_parallel(*where, a->b * a->s, rows_at_once(a->h), [a](int64_t begin, int64_t end) {
    mdept::look_up(*a, begin, end);
  });
  return 0;
}

int mdept_remap_backward_cpu(const MdeptRemapBackward* a, const MdeptWhere* where) {
  in_parallel(*where, a->u, rows_at_once(a->h), [a](int64_t begin, int64_t end) { mdept::backward(*a, begin, end); });
  if (a->grad_position != nullptr)
    in_parallel(*where, a->positions, rows_at_once(a->h), [a](int64_t begin, int64_t end) {
      mdept::backward_of_positions(*a, begin, end);
    });
  return 0;
}
