// Sample index of one epoch: where each training sample starts in a shuffled concatenation of documents.
//
// Torch-free and numpy-facing (pybind11). The semantics are Megatron's build_sample_idx for one epoch with the last
// partial sample dropped; megatron_dept/ops/index_builder.py states them and holds the numpy reference.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>

namespace py = pybind11;

namespace {

// How far ahead of the gather its cache lines are asked for: the order is shuffled, so every size is a cache miss.
constexpr int64_t kPrefetchDistance = 16;

// Sizes in shuffled order, gathered once: the second pass must know their sum to allocate. Returns the sum.
int64_t gather_sizes(const int32_t* sizes, int64_t documents, const int64_t* order, int64_t ordered,
                     int32_t* gathered) {
  int64_t total = 0;
  for (int64_t i = 0; i < ordered; ++i) {
    if (i + kPrefetchDistance < ordered) {
      const int64_t ahead = order[i + kPrefetchDistance];
      if (ahead >= 0 && ahead < documents) __builtin_prefetch(sizes + ahead);
    }
    const int64_t document = order[i];
    if (document < 0 || document >= documents) {
      throw std::invalid_argument("document_order[" + std::to_string(i) + "] is " + std::to_string(document) +
                                  ", outside the " + std::to_string(documents) + " documents");
    }
    const int32_t size = sizes[document];
    if (size < 0) {
      throw std::invalid_argument("sizes[" + std::to_string(document) + "] is negative: " + std::to_string(size));
    }
    gathered[i] = size;
    total += size;
  }
  return total;
}

// Writes (index into the order, token offset in that document) of tokens 0, seq_length, 2 seq_length, ... : samples + 1
// pairs, all of which lie within the gathered sizes.
void fill_sample_index(const int32_t* gathered, int64_t seq_length, int64_t samples, int64_t* out) {
  int64_t offset = 0;  // of the next sample's first token, counted from the start of the current document
  int64_t written = 0;
  for (int64_t i = 0; written <= samples; ++i) {
    const int64_t size = gathered[i];
    while (offset < size && written <= samples) {
      out[2 * written] = i;
      out[2 * written + 1] = offset;
      ++written;
      offset += seq_length;
    }
    offset -= size;
  }
}

using Sizes = py::array_t<int32_t, py::array::c_style>;
using Order = py::array_t<int64_t, py::array::c_style>;

py::array_t<int64_t> build_sample_index(const Sizes& sizes, const Order& order, int64_t seq_length) {
  if (sizes.ndim() != 1 || order.ndim() != 1) {
    throw std::invalid_argument("sizes and document_order must have one dimension");
  }
  if (seq_length < 1) {
    throw std::invalid_argument("seq_length must be positive, not " + std::to_string(seq_length));
  }
  const int32_t* sizes_data = sizes.data();
  const int64_t* order_data = order.data();
  if (reinterpret_cast<uintptr_t>(sizes_data) % alignof(int32_t) ||
      reinterpret_cast<uintptr_t>(order_data) % alignof(int64_t)) {
    throw std::invalid_argument("sizes and document_order must be aligned in memory");
  }
  const int64_t documents = sizes.size();
  const int64_t ordered = order.size();
  // new[] rather than a vector, which would first write zeros over all of it.
  const std::unique_ptr<int32_t[]> gathered(new int32_t[static_cast<size_t>(ordered)]);
  int64_t total = 0;
  {
    py::gil_scoped_release unlocked;
    total = gather_sizes(sizes_data, documents, order_data, ordered, gathered.get());
  }
  if (total <= seq_length) {
    throw std::invalid_argument(std::to_string(total) + " tokens are too few for one sample of seq_length " +
                                std::to_string(seq_length) + " + 1");
  }
  const int64_t samples = (total - 1) / seq_length;
  py::array_t<int64_t> index({samples + 1, int64_t{2}});
  int64_t* out = index.mutable_data();
  {
    py::gil_scoped_release unlocked;
    fill_sample_index(gathered.get(), seq_length, samples, out);
  }
  return index;
}

}  // namespace

PYBIND11_MODULE(_index_builder, module) {
  module.doc() = "Native index builders; use megatron_dept.ops.index_builder.";
  module.def("build_sample_index", &build_sample_index, py::arg("sizes").noconvert(),
             py::arg("document_order").noconvert(), py::arg("seq_length"));
}
