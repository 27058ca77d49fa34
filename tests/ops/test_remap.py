"""The fused look-up against torch's embedding, forward and backward, and against sums taken one by one."""

import pytest
import torch
import torch.nn.functional as F

from megatron_dept.ops import reference, remap

BOTH = pytest.mark.parametrize("module", [remap, reference])
IDS = torch.tensor([[5, 1, 5], [0, 5, 1]])
LOCAL_OF = torch.tensor([2, 0, -1, -1, -1, 3], dtype=torch.int32)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_row_and_position_are_added_in_fp32_and_rounded_once(module, dtype):
    table, position = drawn(4, 7), drawn(5, 7, seed=1)
    found = module.remap_lookup(IDS, LOCAL_OF, table, position, dtype)
    expected = (table[LOCAL_OF[IDS].long()] + position[:3]).to(dtype)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@BOTH
def test_rows_of_other_shards_are_zeros(module):
    table = drawn(2, 3)
    found = module.remap_lookup(torch.tensor([[0, 1, 2, 3]]), None, table, None, torch.float32, start=1)
    assert torch.equal(found[0], torch.stack([torch.zeros(3), table[0], table[1], torch.zeros(3)]))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_sums_each_row_in_order(module, dtype):
    grad = drawn(2, 3, 4).to(dtype)
    touched, grad_rows, grad_position = module.remap_lookup_backward(IDS, LOCAL_OF, grad, 2, 2, 4)
    zero = torch.zeros(4)
    assert touched.tolist() == [0, 1]
    expected = torch.stack(
        [
            zero + grad[1, 0].float(),
            zero + grad[0, 0].float() + grad[0, 2].float() + grad[1, 1].float(),
        ]
    )
    assert torch.equal(grad_rows, expected)
    assert torch.equal(grad_position, torch.cat([zero + grad[0].float() + grad[1].float(), zero[None]]))


@BOTH
def test_without_positions_there_is_no_gradient_of_them(module):
    touched, grad_rows, grad_position = module.remap_lookup_backward(IDS, None, drawn(2, 3, 4), 1, 9, 0)
    assert touched.tolist() == [] and grad_rows.shape == (0, 4) and grad_position is None


@pytest.mark.parametrize("learned", [True, False])
def test_gradients_are_those_of_torchs_embedding(learned):
    table, position = drawn(6, 3).requires_grad_(), drawn(4, 3, seed=1).requires_grad_()
    weight = drawn(2, 3, 3, seed=2)
    expected = F.embedding(IDS, table) + (position[:3] if learned else 0)
    wanted = torch.autograd.grad((expected * weight).sum(), [table, position] if learned else [table])
    remapped = remap.remap_lookup(IDS, None, table, position if learned else None, torch.float32)
    found = torch.autograd.grad((remapped * weight).sum(), [table, position] if learned else [table])
    # Sums of at most three fp32 numbers of order 1, perhaps in another order.
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_nothing_looked_up():
    ids = torch.empty(2, 0, dtype=torch.int64)
    table = drawn(3, 4).requires_grad_()
    found = remap.remap_lookup(ids, None, table, None, torch.float32)
    assert found.shape == (2, 0, 4)
    found.sum().backward()
    assert not table.grad.to_dense().any()


@pytest.mark.parametrize("wrong", [-1, 6])
def test_an_id_that_is_not_mapped_is_refused(wrong):
    ids = torch.tensor([[0, wrong]])
    with pytest.raises(IndexError, match="outside 0..5"):
        remap.remap_lookup(ids, LOCAL_OF, drawn(4, 2), None, torch.float32)
    with pytest.raises(IndexError, match="outside 0..5"):
        remap.remap_lookup_backward(ids, LOCAL_OF, drawn(1, 2, 2), 4, 0, 0)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("ids", IDS.int()),
        ("ids", IDS[0]),
        ("local_of", LOCAL_OF.long()),
        ("table", drawn(4, 7).double()),
        ("table", drawn(7, 4).t()),
        ("position", drawn(5, 6)),
        ("position", drawn(2, 7)),
        ("dtype", torch.float64),
    ],
)
def test_what_does_not_fit_is_named(name, wrong):
    arguments = {
        "ids": IDS,
        "local_of": LOCAL_OF,
        "table": drawn(4, 7),
        "position": drawn(5, 7),
        "dtype": torch.float32,
    }
    remap.remap_lookup(**arguments)
    with pytest.raises(ValueError, match=f"^{name} "):
        remap.remap_lookup(**{**arguments, name: wrong})


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_gradient_added_to_the_heads_is_that_of_autograd(learned, micro_batches):
    weight = drawn(2, 3, 3, seed=2)

    def gradients(look_up):
        table, position = drawn(6, 3).requires_grad_(), drawn(4, 3, seed=1).requires_grad_()
        for _ in range(micro_batches):
            rows = look_up(IDS, None, table, position if learned else None, torch.float32)
            # The table a second time, as the tied head has it.
            ((rows * 2).flatten(0, 1) @ table.t()).sum().add((rows * weight).sum()).backward()
        return [table.grad, position.grad] if learned else [table.grad]

    for one, other in zip(gradients(remap.remap_lookup_adding_gradient), gradients(remap.remap_lookup), strict=True):
        # Two micro-batches are four sums in another order: fp32 numbers of order 10.
        torch.testing.assert_close(one, other, rtol=0, atol=0 if micro_batches == 1 else 1e-5)


def test_the_gradient_is_added_to_the_heads_own_memory():
    table = drawn(6, 3).requires_grad_()
    held = {}

    class Head(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows, table):
            ctx.shape = rows.shape
            return rows.sum() + table.sum()

        @staticmethod
        def backward(ctx, grad):
            dense = torch.ones(6, 3)
            held["address"] = dense.data_ptr()
            return torch.ones(ctx.shape), dense

    Head.apply(remap.remap_lookup_adding_gradient(IDS, None, table, None, torch.float32), table).backward()
    assert table.grad.data_ptr() == held["address"]
    expected = torch.ones(6, 3)
    expected += torch.bincount(IDS.flatten(), minlength=6).unsqueeze(1)
    assert torch.equal(table.grad, expected)


def test_a_table_without_a_head_gets_a_gradient_and_one_without_gradients_none():
    table = drawn(6, 3).requires_grad_()
    remap.remap_lookup_adding_gradient(IDS, None, table, None, torch.float32).sum().backward()
    assert torch.equal(table.grad[:, 0], torch.bincount(IDS.flatten(), minlength=6).float())
    frozen, position = drawn(6, 3), drawn(4, 3).requires_grad_()
    remap.remap_lookup_adding_gradient(IDS, None, frozen, position, torch.float32).sum().backward()
    assert frozen.grad is None and position.grad is not None
    with torch.no_grad():
        assert not remap.remap_lookup_adding_gradient(IDS, None, table, None, torch.float32).requires_grad
    with pytest.raises(ValueError, match="^table is no leaf"):
        remap.remap_lookup_adding_gradient(IDS, None, table * 1, None, torch.float32)
