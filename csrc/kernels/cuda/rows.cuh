// Kernels on rows of a table: look-up by id, scatter of a mean with the outer step, sums of listed rows.
//
// n rows of a shard, h hidden, k ids or touched rows, m listed rows. A row is worked on by `lanes` threads that lie
// beside each other (a power of two; see `lanes_for`), which need nothing of each other: no barrier, no shuffle, and
// every output element is written by one thread, which makes the results deterministic. W elements go in one access;
// h is a multiple of W and all rows are aligned to it, or W is 1.

#pragma once

#include "common.cuh"

namespace mdept {

// The threads of the grid as groups of `lanes`: this thread's group, how many there are, and its place in the group.
struct Groups {
  int64_t group, count;
  int lane;
};
__device__ __forceinline__ Groups groups_of(int lanes) {
  const int each = kThreads / lanes;
  const int thread = static_cast<int>(threadIdx.x);
  return {static_cast<int64_t>(blockIdx.x) * each + thread / lanes, static_cast<int64_t>(gridDim.x) * each,
          thread % lanes};
}

// out[i] = table[row] (+ position[i % sequence], in fp32), rounded once; row = local - start, where local is the id
// itself or local_of[id]. A row outside [0, rows) reads as zeros. Gather of rows and look-up of embeddings are this.
template <typename Out, int W>
__global__ void __launch_bounds__(kThreads, W == 8 ? 3 : 4)
    lookup_rows(const float* __restrict__ table, int64_t rows, int64_t hidden, const int64_t* __restrict__ ids,
                int64_t count, const int32_t* __restrict__ local_of, int64_t start, const float* __restrict__ position,
                int64_t sequence, Out* __restrict__ out, int lanes) {
  constexpr int kAhead = W == 8 ? 3 : 4;  // independent accesses of a thread in flight
  const Groups groups = groups_of(lanes);
  const int64_t step = static_cast<int64_t>(lanes) * W;
  int64_t place = position ? groups.group % sequence : 0;  // i % sequence, kept by addition: division is slow
  const int64_t place_step = position ? groups.count % sequence : 0;
  int64_t next = groups.group < count ? ids[groups.group] : 0;
  for (int64_t i = groups.group; i < count; i += groups.count) {
    const int64_t row = (local_of ? static_cast<int64_t>(local_of[next]) : next) - start;
    if (i + groups.count < count) next = ids[i + groups.count];
    const bool held = row >= 0 && row < rows;
    const float* from = table + (held ? row * hidden : 0);
    const float* added = position ? position + place * hidden : nullptr;
    for (int64_t column = static_cast<int64_t>(groups.lane) * W; column < hidden; column += step * kAhead) {
      Pack<float, W> values[kAhead] = {};
      if (held) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j)
          if (column + j * step < hidden) values[j] = load<W>(from + column + j * step);
      }
      if (position) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
          if (column + j * step >= hidden) continue;
          const Pack<float, W> add = load<W>(added + column + j * step);
#pragma unroll
          for (int e = 0; e < W; ++e) values[j].v[e] = __fadd_rn(values[j].v[e], add.v[e]);
        }
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j)
        if (column + j * step < hidden) store<W>(out + i * hidden + column + j * step, values[j]);
    }
    place += place_step;
    if (place >= sequence) place -= sequence;
  }
}

// W elements of the sum of rows listed at places begin..end-1, added one after another in that order. Row of place j:
// order[j], or first + j * stride where there is no order. The loads of kAhead rows are in flight together.
template <int W, int kAhead, typename In>
__device__ __forceinline__ Pack<float, W> sum_in_order(const In* __restrict__ in, int64_t hidden, int64_t column,
                                                       const int64_t* __restrict__ order, int64_t begin, int64_t end,
                                                       int64_t first, int64_t stride) {
  Pack<float, W> sum = {};
#pragma unroll 1
  for (int64_t j = begin; j < end; j += kAhead) {
    int64_t rows[kAhead];  // past the end the last one again: with no branch these reads go out together
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      rows[a] = order ? order[j + a < end ? j + a : end - 1] : first + (j + a) * stride;
    Pack<float, W> values[kAhead] = {};
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (j + a < end) values[a] = load<W>(in + rows[a] * hidden + column);
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      if (j + a >= end) continue;
#pragma unroll
      for (int e = 0; e < W; ++e) sum.v[e] = __fadd_rn(sum.v[e], values[a].v[e]);
    }
  }
  return sum;
}

// For touched row u: d = sum of its deltas / counts[u], then the outer step of table[rows[u]] and its momentum.
template <typename Delta, int W>
__global__ void __launch_bounds__(kThreads, 4)
    scatter_mean(float* __restrict__ table, float* __restrict__ momentum, int64_t hidden,
                 const int64_t* __restrict__ rows, int64_t count, const int64_t* __restrict__ starts,
                 const int64_t* __restrict__ order, const Delta* __restrict__ deltas,
                 const int32_t* __restrict__ counts, float learning_rate, float mu, int lanes) {
  const Groups groups = groups_of(lanes);
  // What says where a row's numbers are is read one row ahead: else the numbers themselves would wait for it.
  int64_t next_begin = 0, next_end = 0, next_row = 0;
  if (groups.group < count) {
    next_begin = starts[groups.group];
    next_end = starts[groups.group + 1];
    next_row = rows[groups.group];
  }
  for (int64_t u = groups.group; u < count; u += groups.count) {
    const int64_t begin = next_begin, end = next_end, row = next_row;
    const float holders = static_cast<float>(counts[u]);
    if (u + groups.count < count) {
      next_begin = starts[u + groups.count];
      next_end = starts[u + groups.count + 1];
      next_row = rows[u + groups.count];
    }
    for (int64_t column = static_cast<int64_t>(groups.lane) * W; column < hidden; column += lanes * W) {
      float* at = table + row * hidden + column;
      float* momentum_at = momentum ? momentum + row * hidden + column : nullptr;
      Pack<float, W> value = load<W>(at), speed = {};
      if (momentum) speed = load<W>(momentum_at);
      const Pack<float, W> sum = sum_in_order<W, 4>(deltas, hidden, column, order, begin, end, 0, 0);
#pragma unroll
      for (int e = 0; e < W; ++e) {
        const float mean = __fdiv_rn(sum.v[e], holders);
        value.v[e] = momentum ? outer_step(value.v[e], mean, learning_rate, mu, speed.v[e])
                              : outer_step(value.v[e], mean, learning_rate);
      }
      store<W>(at, value);
      if (momentum) store<W>(momentum_at, speed);
    }
  }
}

// out[u] = sum in order of the rows of `in` that are listed for u: at starts[u]..starts[u+1]-1 of `order`, or, without
// an order, rows u, u + count, u + 2 count, ... `repeats` of them. A group does one slab of columns of one row, so that
// a row with very many entries (a frequent token's gradient) is spread over several groups.
template <typename In, int W>
__global__ void __launch_bounds__(kThreads, 3)
    sum_rows(const In* __restrict__ in, int64_t hidden, const int64_t* __restrict__ starts,
             const int64_t* __restrict__ order, int64_t count, int64_t repeats, float* __restrict__ out, int lanes) {
  const Groups groups = groups_of(lanes);
  const int64_t slab = static_cast<int64_t>(lanes) * W;
  const int64_t slabs = (hidden + slab - 1) / slab;
  for (int64_t item = groups.group; item < count * slabs; item += groups.count) {
    const int64_t u = item / slabs;
    const int64_t column = (item - u * slabs) * slab + static_cast<int64_t>(groups.lane) * W;
    if (column >= hidden) continue;
    const int64_t begin = order ? starts[u] : 0, end = order ? starts[u + 1] : repeats;
    store<W>(out + u * hidden + column, sum_in_order<W, 8>(in, hidden, column, order, begin, end, u, count));
  }
}

}  // namespace mdept
