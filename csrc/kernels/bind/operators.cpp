// The operators torch.ops.megatron_dept.*: each checks its tensors and calls a kernel of launch.h.
//
// All write into tensors that they are given, so that no shape need be known here. megatron_dept/ops has their faces.

#include "torch_side.h"

namespace {

using mdept::check_starts;
using mdept::check_within;
using mdept::data;
using mdept::element_type;
using mdept::MaybeTensor;
using mdept::ScalarType;
using mdept::Tensor;

constexpr ScalarType kFloat = ScalarType::Float, kLong = ScalarType::Long, kInt = ScalarType::Int,
                     kByte = ScalarType::Byte;

int64_t wire_bytes(int64_t n, int64_t wire) {
  STD_TORCH_CHECK(wire >= MDEPT_WIRE_FP32 && wire <= MDEPT_WIRE_INT8, "wire is ", wire);
  if (wire == MDEPT_WIRE_INT8) return (n + 3) / 4 * 4 + (n + MDEPT_BLOCK - 1) / MDEPT_BLOCK * 4;
  return n * (wire == MDEPT_WIRE_FP32 ? 4 : 2);
}

template <class T>
T* packed_data(const char* name, const Tensor& packed, int64_t bytes, int64_t wire, const Tensor& beside) {
  T* start = data<T>(name, packed, kByte, bytes, beside);
  const uintptr_t unit = wire == MDEPT_WIRE_BF16 ? 2 : 4;
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(start) % unit == 0, name, " is not aligned to ", unit, " bytes");
  return start;
}

void expect_matrix(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2, name, " is not a matrix");
}

void trim_gather(Tensor table, Tensor ids, int64_t first, Tensor out) {
  expect_matrix("table", table);
  const int64_t n = table.size(0), h = table.size(1), k = ids.numel();
  MdeptTrimGather a{};
  a.table = data<const float>("table", table, kFloat, n * h, table);
  a.ids = data<const int64_t>("ids", ids, kLong, k, table);
  a.out = data<void>("out", out, out.scalar_type(), k * h, table);
  a.n = n, a.h = h, a.k = k, a.first = first, a.dtype = element_type("out", out);
  MDEPT_RUN(trim_gather, a, table);
}

void trim_scatter_mean(Tensor table, MaybeTensor momentum, Tensor rows, Tensor starts, Tensor order, Tensor deltas,
                       Tensor counts, double learning_rate, double mu) {
  expect_matrix("table", table);
  expect_matrix("deltas", deltas);
  MdeptTrimScatterMean a{};
  a.n = table.size(0), a.h = table.size(1), a.k = rows.numel(), a.m = deltas.size(0);
  a.table = data<float>("table", table, kFloat, a.n * a.h, table);
  a.momentum = data<float>("momentum", momentum, kFloat, a.n * a.h, table);
  a.rows = data<const int64_t>("rows", rows, kLong, a.k, table);
  a.starts = data<const int64_t>("starts", starts, kLong, a.k + 1, table);
  a.order = data<const int64_t>("order", order, kLong, order.numel(), table);
  a.deltas = data<const void>("deltas", deltas, deltas.scalar_type(), a.m * a.h, table);
  a.dtype = element_type("deltas", deltas);
  a.counts = data<const int32_t>("counts", counts, kInt, a.k, table);
  a.learning_rate = static_cast<float>(learning_rate), a.mu = static_cast<float>(mu);
  if (table.is_cpu()) {
    check_starts(a.starts, a.k, order.numel());
    check_within("order", a.order, order.numel(), a.m);
    check_within("rows", a.rows, a.k, a.n);
    for (int64_t i = 1; i < a.k; ++i) STD_TORCH_CHECK(a.rows[i - 1] < a.rows[i], "rows is not ascending and unique");
  }
  MDEPT_RUN(trim_scatter_mean, a, table);
}

void remap_lookup(Tensor ids, MaybeTensor local_of, Tensor table, MaybeTensor position, int64_t start, Tensor out) {
  expect_matrix("ids", ids);
  expect_matrix("table", table);
  MdeptRemapLookup a{};
  a.b = ids.size(0), a.s = ids.size(1), a.v = table.size(0), a.h = table.size(1), a.start = start;
  a.ids = data<const int64_t>("ids", ids, kLong, a.b * a.s, table);
  const int64_t mapped = local_of.has_value() ? local_of->numel() : 0;
  a.local_of = data<const int32_t>("local_of", local_of, kInt, mapped, table);
  a.table = data<const float>("table", table, kFloat, a.v * a.h, table);
  if (position.has_value()) {
    expect_matrix("position", *position);
    STD_TORCH_CHECK(position->size(0) >= a.s, "position is shorter than the sequence");
    a.position = data<const float>("position", *position, kFloat, position->size(0) * a.h, table);
  }
  a.out = data<void>("out", out, out.scalar_type(), a.b * a.s * a.h, table);
  a.dtype = element_type("out", out);
  if (table.is_cpu() && a.local_of != nullptr) check_within("ids", a.ids, a.b * a.s, mapped);
  MDEPT_RUN(remap_lookup, a, table);
}

void remap_backward(Tensor grad, Tensor starts, Tensor order, Tensor grad_rows, MaybeTensor grad_position) {
  STD_TORCH_CHECK(grad.dim() == 3, "grad is not [b, s, h]");
  MdeptRemapBackward a{};
  a.b = grad.size(0), a.s = grad.size(1), a.h = grad.size(2), a.u = starts.numel() - 1;
  a.grad = data<const void>("grad", grad, grad.scalar_type(), a.b * a.s * a.h, grad);
  a.dtype = element_type("grad", grad);
  a.starts = data<const int64_t>("starts", starts, kLong, a.u + 1, grad);
  a.order = data<const int64_t>("order", order, kLong, order.numel(), grad);
  a.grad_rows = data<float>("grad_rows", grad_rows, kFloat, a.u * a.h, grad);
  if (grad_position.has_value()) {
    expect_matrix("grad_position", *grad_position);
    a.positions = grad_position->size(0);
    STD_TORCH_CHECK(a.positions >= a.s, "grad_position is shorter than the sequence");
    a.grad_position = data<float>("grad_position", *grad_position, kFloat, a.positions * a.h, grad);
  }
  if (grad.is_cpu()) {
    check_starts(a.starts, a.u, order.numel());
    check_within("order", a.order, order.numel(), a.b * a.s);
  }
  MDEPT_RUN(remap_backward, a, grad);
}

void body_pack(Tensor value, MaybeTensor local, MaybeTensor carried, MaybeTensor residual, int64_t wire, Tensor out) {
  MdeptBodyPack a{};
  a.n = value.numel(), a.wire = static_cast<int32_t>(wire);
  a.value = data<const float>("value", value, kFloat, a.n, value);
  a.local = data<const float>("local", local, kFloat, a.n, value);
  a.carried = data<const float>("carried", carried, kFloat, a.n, value);
  a.residual = data<float>("residual", residual, kFloat, a.n, value);
  a.out = packed_data<void>("out", out, wire_bytes(a.n, wire), wire, value);
  MDEPT_RUN(body_pack, a, value);
}

void body_mean(Tensor received, int64_t sources, int64_t wire, Tensor out) {
  MdeptBodyMean a{};
  expect_matrix("received", received);
  a.n = out.numel(), a.wire = static_cast<int32_t>(wire), a.sources = sources;
  a.silos = received.size(0), a.bytes = wire_bytes(a.n, wire);
  STD_TORCH_CHECK(a.silos > 0 && sources > 0, "nothing was received");
  a.received = packed_data<const void>("received", received, a.silos * a.bytes, wire, out);
  a.out = data<float>("out", out, kFloat, a.n, out);
  MDEPT_RUN(body_mean, a, out);
}

void body_unpack(Tensor received, int64_t sources, Tensor value, MaybeTensor momentum, double learning_rate, double mu,
                 int64_t wire, Tensor back, MaybeTensor back_residual) {
  MdeptBodyUnpack a{};
  expect_matrix("received", received);
  a.n = value.numel(), a.wire = static_cast<int32_t>(wire), a.sources = sources;
  a.silos = received.size(0), a.bytes = wire_bytes(a.n, wire);
  STD_TORCH_CHECK(a.silos > 0 && sources > 0, "nothing was received");
  a.received = packed_data<const void>("received", received, a.silos * a.bytes, wire, value);
  a.value = data<const float>("value", value, kFloat, a.n, value);
  a.momentum = data<float>("momentum", momentum, kFloat, a.n, value);
  a.learning_rate = static_cast<float>(learning_rate), a.mu = static_cast<float>(mu);
  a.back = packed_data<void>("back", back, a.bytes, wire, value);
  a.back_residual = data<float>("back_residual", back_residual, kFloat, a.n, value);
  MDEPT_RUN(body_unpack, a, value);
}

void body_apply(Tensor back, Tensor value, int64_t wire, MaybeTensor master, MaybeTensor low) {
  MdeptBodyApply a{};
  a.n = value.numel(), a.wire = static_cast<int32_t>(wire);
  a.back = packed_data<const void>("back", back, wire_bytes(a.n, wire), wire, value);
  a.value = data<float>("value", value, kFloat, a.n, value);
  a.master = data<float>("master", master, kFloat, a.n, value);
  if (low.has_value()) {
    a.low = data<void>("low", *low, low->scalar_type(), a.n, value);
    a.low_dtype = element_type("low", *low);
    STD_TORCH_CHECK(a.low_dtype != MDEPT_FP32, "low is not bf16 or fp16");
  }
  MDEPT_RUN(body_apply, a, value);
}

void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("trim_gather", TORCH_BOX(&trim_gather));
  m.impl("trim_scatter_mean", TORCH_BOX(&trim_scatter_mean));
  m.impl("remap_lookup", TORCH_BOX(&remap_lookup));
  m.impl("remap_backward", TORCH_BOX(&remap_backward));
  m.impl("body_pack", TORCH_BOX(&body_pack));
  m.impl("body_mean", TORCH_BOX(&body_mean));
  m.impl("body_unpack", TORCH_BOX(&body_unpack));
  m.impl("body_apply", TORCH_BOX(&body_apply));
}

}  // namespace

STABLE_TORCH_LIBRARY(megatron_dept, m) {
  m.def("trim_gather(Tensor table, Tensor ids, int first, Tensor(a!) out) -> ()");
  m.def(
      "trim_scatter_mean(Tensor(a!) table, Tensor(b!)? momentum, Tensor rows, Tensor starts, Tensor order, "
      "Tensor deltas, Tensor counts, float learning_rate, float mu) -> ()");
  m.def(
      "remap_lookup(Tensor ids, Tensor? local_of, Tensor table, Tensor? position, int start, Tensor(a!) out) -> ()");
  m.def(
      "remap_backward(Tensor grad, Tensor starts, Tensor order, Tensor(a!) grad_rows, Tensor(b!)? grad_position) "
      "-> ()");
  m.def(
      "body_pack(Tensor value, Tensor? local, Tensor? carried, Tensor(a!)? residual, int wire, Tensor(b!) out) "
      "-> ()");
  m.def("body_mean(Tensor received, int sources, int wire, Tensor(a!) out) -> ()");
  m.def(
      "body_unpack(Tensor received, int sources, Tensor value, Tensor(a!)? momentum, float learning_rate, float mu, "
      "int wire, Tensor(b!) back, Tensor(c!)? back_residual) -> ()");
  m.def("body_apply(Tensor back, Tensor(a!) value, int wire, Tensor(b!)? master, Tensor(c!)? low) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(megatron_dept, CPU, m) { implement(m); }

#ifdef MDEPT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(megatron_dept, CUDA, m) { implement(m); }
#endif
