// What the operators share on torch's side: tensors checked and taken apart, and where a kernel runs.
//
// Only torch's stable ABI is used, that of 2.11: one library serves every later torch, with CUDA or without.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "launch.h"

#ifdef MDEPT_WITH_CUDA
#include <dlfcn.h>
#endif

namespace mdept {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The faces in Python have said what is wrong in words; this keeps a direct call from touching memory that is not there.
inline void expect(const char* name, const Tensor& tensor, ScalarType type, int64_t elements, const Tensor& beside) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.numel() == elements, name, " has ", tensor.numel(), " elements; want ", elements);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
  STD_TORCH_CHECK(tensor.is_cpu() == beside.is_cpu() && tensor.get_device_index() == beside.get_device_index(),
                  name, " is on another device");
}

// The data of a checked tensor.
template <class T>
T* data(const char* name, const Tensor& tensor, ScalarType type, int64_t elements, const Tensor& beside) {
  expect(name, tensor, type, elements, beside);
  return static_cast<T*>(tensor.data_ptr());
}

template <class T>
T* data(const char* name, const MaybeTensor& tensor, ScalarType type, int64_t elements, const Tensor& beside) {
  return tensor.has_value() ? data<T>(name, *tensor, type, elements, beside) : nullptr;
}

inline int32_t element_type(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return MDEPT_FP32;
    case ScalarType::BFloat16: return MDEPT_BF16;
    case ScalarType::Half: return MDEPT_FP16;
    default: STD_TORCH_CHECK(false, name, " is not fp32, bf16 or fp16");
  }
}

inline void check_within(const char* name, const int64_t* numbers, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(numbers[i] >= 0 && numbers[i] < size, name, "[", i, "] is ", numbers[i], ", outside 0..", size - 1);
}

inline void check_starts(const int64_t* starts, int64_t groups, int64_t listed) {
  STD_TORCH_CHECK(starts[0] == 0 && starts[groups] <= listed, "starts does not begin at 0, or ends beyond order");
  for (int64_t i = 0; i < groups; ++i) STD_TORCH_CHECK(starts[i] <= starts[i + 1], "starts is not ascending");
}

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, MdeptTask task, void* context) {
  torch::stable::parallel_for(begin, end, grain, [task, context](int64_t from, int64_t to) { task(from, to, context); });
}

#ifdef MDEPT_WITH_CUDA
// The one symbol that a torch without CUDA lacks, so it is looked up when a CUDA tensor has come.
inline void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library == nullptr ? nullptr : reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "this torch has no CUDA streams");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "no current CUDA stream");
  return stream;
}
#endif

// Runs the CPU or the CUDA form of a kernel, by where `tensor` lies.
#ifdef MDEPT_WITH_CUDA
#define MDEPT_RUN(kernel, arguments, tensor) \
  mdept::run(#kernel, mdept_##kernel##_cpu, mdept_##kernel##_cuda, arguments, tensor)
#else
#define MDEPT_RUN(kernel, arguments, tensor) mdept::run(#kernel, mdept_##kernel##_cpu, nullptr, arguments, tensor)
#endif

template <class Arguments>
struct Kernel {
  using Type = int (*)(const Arguments*, const MdeptWhere*);
};

template <class Arguments>
void run(const char* name, typename Kernel<Arguments>::Type cpu, typename Kernel<Arguments>::Type cuda,
         const Arguments& arguments, const Tensor& tensor) {
  if (tensor.is_cpu()) {
    const MdeptWhere where{parallel_for, nullptr};
    cpu(&arguments, &where);
    return;
  }
#ifdef MDEPT_WITH_CUDA
  const torch::stable::accelerator::DeviceGuard guard(tensor.get_device_index());
  const MdeptWhere where{nullptr, current_stream(tensor.get_device_index())};
  const int error = cuda(&arguments, &where);
  STD_TORCH_CHECK(error == 0, "the CUDA kernel ", name, " was not launched: ", mdept_cuda_error(error));
#else
  (void)cuda;
  STD_TORCH_CHECK(false, name, ": this library was built without CUDA");
#endif
}

}  // namespace mdept
