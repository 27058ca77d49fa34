// Rows of a table on the CPU: gathered, averaged back, looked up, and the look-up's gradient; see launch.h.

#include <vector>

#include "elements.h"

namespace mdept {
namespace {

// A row is worked on in parts of so many elements, which stay in the processor's nearest cache.
constexpr int64_t kPart = 1024;

// Columns that are worth a thread of their own, where threads share rows.
constexpr int64_t kColumnsAtOnce = 128;

// Rows come from anywhere in the table, so the processor does not foresee them: while one is worked on, the one after the
// next is asked into the second cache, a few lines at a time, at the pace at which this one is read.
constexpr int64_t kStep = 64;
constexpr int64_t kAhead = 2;

MDEPT_INLINE void prefetch_step(const float* row) {
  for (int64_t i = 0; i < kStep; i += 16) __builtin_prefetch(row + i, 0, 2);
}

template <class To>
MDEPT_INLINE void copy_row(const float* __restrict from, To* __restrict to, int64_t h, const float* ahead) {
  int64_t i = 0;
  for (; i + kStep <= h; i += kStep) {
    prefetch_step(ahead + i);
    cast_all(from + i, to + i, kStep);
  }
  cast_all(from + i, to + i, h - i);
}

template <class To>
MDEPT_INLINE void gather_as(const MdeptTrimGather& a, int64_t begin, int64_t end) {
  To* out = static_cast<To*>(a.out);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = a.ids[i] - a.first;
    if (row < 0 || row >= a.n) {
      std::memset(out + i * a.h, 0, a.h * sizeof(To));
      continue;
    }
    const int64_t later = i + kAhead < end ? a.ids[i + kAhead] - a.first : row;
    const float* ahead = a.table + (later >= 0 && later < a.n ? later : row) * a.h;
    copy_row(a.table + row * a.h, out + i * a.h, a.h, ahead);
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
MDEPT_INLINE void copy_sum(
    const float* __restrict row, const float* __restrict position, To* __restrict to, int64_t h, const float* ahead) {
  float sum[kStep];
  for (int64_t i = 0; i < h; i += kStep) {
    const int64_t size = h - i < kStep ? h - i : kStep;
    if (size == kStep) prefetch_step(ahead + i);
    for (int64_t j = 0; j < size; ++j) sum[j] = row[i + j] + position[i + j];
    cast_all(sum, to + i, size);
  }
}

template <class To>
MDEPT_INLINE void add_nothing(const float* __restrict position, To* __restrict to, int64_t h) {
  for (int64_t i = 0; i < h; ++i) cast(0.0f + position[i], to[i]);
}

MDEPT_INLINE int64_t row_of(const MdeptRemapLookup& a, int64_t token) {
  const int64_t id = a.ids[token];
  return (a.local_of == nullptr ? id : a.local_of[id]) - a.start;
}

template <class To>
MDEPT_INLINE void look_up_as(const MdeptRemapLookup& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t row = row_of(a, token);
    const bool inside = row >= 0 && row < a.v;
    const int64_t later = token + kAhead < end ? row_of(a, token + kAhead) : row;
    const float* ahead = a.table + (later >= 0 && later < a.v ? later : row) * a.h;
    To* to = static_cast<To*>(a.out) + token * a.h;
    const float* position = a.position == nullptr ? nullptr : a.position + token % a.s * a.h;
    if (inside && position != nullptr)
      copy_sum(a.table + row * a.h, position, to, a.h, ahead);
    else if (inside)
      copy_row(a.table + row * a.h, to, a.h, ahead);
    else if (position != nullptr)
      add_nothing(position, to, a.h);
    else
      std::memset(to, 0, a.h * sizeof(To));
  }
}

// Where a token's gradient goes: the row it was looked up in, and whether it is the first to come there.
struct Place {
  int64_t row;
  bool first;
};

// size columns of one token into its row and its position; either may be null.
template <class From>
MDEPT_INLINE void backward_step(
    const From* __restrict from, float* __restrict row, bool first, float* __restrict position, int64_t size) {
  if (row != nullptr && first)
    for (int64_t i = 0; i < size; ++i) row[i] = 0.0f + widened(from[i]);
  else if (row != nullptr)
    for (int64_t i = 0; i < size; ++i) row[i] += widened(from[i]);
  if (position != nullptr)
    for (int64_t i = 0; i < size; ++i) position[i] += widened(from[i]);
}

// Columns [begin, end) of all tokens in order: the gradient is read once, for both sums.
template <class From>
MDEPT_INLINE void backward_as(const MdeptRemapBackward& a, const Place* places, int64_t begin, int64_t end) {
  const From* grad = static_cast<const From*>(a.grad);
  const int64_t tokens = a.b * a.s;
  for (int64_t token = 0; token < tokens; ++token) {
    const From* from = grad + token * a.h;
    const Place place = places[token];
    float* row = place.row < 0 ? nullptr : a.grad_rows + place.row * a.h;
    float* position = a.grad_position == nullptr ? nullptr : a.grad_position + token % a.s * a.h;
    const int64_t later = token + kAhead < tokens ? places[token + kAhead].row : -1;
    const float* ahead = later < 0 ? nullptr : a.grad_rows + later * a.h;
    int64_t column = begin;
    for (; column + kStep <= end; column += kStep) {
      if (ahead != nullptr) prefetch_step(ahead + column);
      backward_step(
          from + column, row == nullptr ? nullptr : row + column, place.first,
          position == nullptr ? nullptr : position + column, kStep);
    }
    backward_step(
        from + column, row == nullptr ? nullptr : row + column, place.first,
        position == nullptr ? nullptr : position + column, end - column);
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

MDEPT_CLONES void backward(const MdeptRemapBackward& a, const Place* places, int64_t begin, int64_t end) {
  if (a.dtype == MDEPT_BF16) return backward_as<Bf16>(a, places, begin, end);
  if (a.dtype == MDEPT_FP16) return backward_as<Fp16>(a, places, begin, end);
  backward_as<float>(a, places, begin, end);
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
  std::vector<mdept::Place> places(a->b * a->s, mdept::Place{-1, false});
  for (int64_t u = 0; u < a->u; ++u) {
    if (a->starts[u] == a->starts[u + 1]) std::memset(a->grad_rows + u * a->h, 0, a->h * sizeof(float));
    for (int64_t j = a->starts[u]; j < a->starts[u + 1]; ++j) places[a->order[j]] = {u, j == a->starts[u]};
  }
  if (a->grad_position != nullptr) std::memset(a->grad_position, 0, a->positions * a->h * sizeof(float));
  // Threads take columns, so that every sum is one thread's and keeps its order.
  in_parallel(*where, a->h, mdept::kColumnsAtOnce, [a, &places](int64_t begin, int64_t end) {
    mdept::backward(*a, places.data(), begin, end);
  });
  return 0;
}
