"""Native sample index == numpy reference == a walk token by token == Megatron's helper."""

import importlib
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets import helpers

from megatron_dept.ops import index_builder
from megatron_dept.ops.index_builder import build_sample_index, build_sample_index_reference, native_builder

BUILDERS = [build_sample_index, build_sample_index_reference]


@st.composite
def epochs(draw, smallest_size=0):
    """(sizes, document order, seq_length) with enough tokens for one sample."""
    sizes = np.array(draw(st.lists(st.integers(smallest_size, 40), min_size=1, max_size=30)), np.int32)
    order = np.array(draw(st.permutations(range(len(sizes)))), np.int64)
    order = order[: draw(st.integers(1, len(order)))]
    tokens = int(sizes[order].sum())
    if tokens < 2:
        sizes[order[0]] = 2
        tokens = int(sizes[order].sum())
    return sizes, order, draw(st.integers(1, tokens - 1))


def walked(sizes, order, seq_length):
    """Every seq_length-th token of the concatenation, found by listing all tokens."""
    tokens = [(place, offset) for place, document in enumerate(order) for offset in range(sizes[document])]
    return np.array(tokens[: (len(tokens) - 1) // seq_length * seq_length + 1 : seq_length])


def test_native_is_built():
    assert native_builder() is not None


@settings(max_examples=300, deadline=None)
@given(epochs())
def test_native_and_reference_equal_a_walk_over_all_tokens(epoch):
    expected = walked(*epoch)
    for build in BUILDERS:
        found = build(*epoch)
        assert found.dtype == np.int64
        assert found.shape == ((epoch[0][epoch[1]].sum() - 1) // epoch[2] + 1, 2)
        np.testing.assert_array_equal(found, expected)


# Megatron's puts the first sample into an empty first document; ours names the document that holds the token.
@settings(max_examples=100, deadline=None)
@given(epochs(smallest_size=1))
def test_equals_megatron(epoch):
    sizes, order, seq_length = epoch
    expected = helpers.build_sample_idx(
        sizes, order.astype(np.int32), seq_length, 1, int(sizes[order].sum()), True, True
    )
    np.testing.assert_array_equal(build_sample_index(*epoch), expected)


def test_native_equals_reference_on_large_input():
    generator = np.random.default_rng(0)
    sizes = generator.integers(0, 3000, 100_000).astype(np.int32)
    order = generator.permutation(len(sizes))
    np.testing.assert_array_equal(
        build_sample_index(sizes, order, 1024), build_sample_index_reference(sizes, order, 1024)
    )


def test_totals_beyond_32_bits():
    sizes = np.full(4, 2**31 - 1, np.int32)
    for build in BUILDERS:
        found = build(sizes, np.array([3, 1, 0, 2]), 2**31)
        np.testing.assert_array_equal(found, [[0, 0], [1, 1], [2, 2], [3, 3]])


def test_unaligned_sizes_as_the_index_file_has_them():
    buffer = np.zeros(2 + 4 * 3, np.uint8)
    buffer[2:] = np.array([3, 4, 5], np.int32).view(np.uint8)
    sizes = np.frombuffer(buffer, np.int32, 3, 2)
    assert not sizes.flags.aligned
    np.testing.assert_array_equal(build_sample_index(sizes, np.array([2, 0, 1]), 4), [[0, 0], [0, 4], [2, 0]])


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("sizes", "order", "seq_length", "message"),
    [
        ([4, 4], [0, 2], 2, r"document_order\[1\] is 2, outside the 2 documents"),
        ([4, 4], [-1, 0], 2, r"document_order\[0\] is -1"),
        ([4, -4], [0, 1], 2, r"sizes\[1\] is negative: -4"),
        ([2, 2], [0, 1], 4, "4 tokens are too few for one sample of seq_length 4"),
        ([], [], 1, "0 tokens are too few"),
        ([4, 4], [0, 1], 0, "seq_length must be positive"),
    ],
)
def test_bad_arguments_are_named(build, sizes, order, seq_length, message):
    with pytest.raises(ValueError, match=message):
        build(np.array(sizes, np.int32), np.array(order, np.int64), seq_length)


def test_without_the_native_builder_it_warns_once_and_uses_the_reference(monkeypatch):
    def missing(name):
        raise ImportError(f"no {name}")

    arguments = np.array([5, 5], np.int32), np.array([1, 0]), 3
    monkeypatch.setattr(importlib, "import_module", missing)
    index_builder.native_builder.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"is not built .*pip install"):
            found = build_sample_index(*arguments)
        np.testing.assert_array_equal(found, build_sample_index_reference(*arguments))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build_sample_index(*arguments)
    finally:
        index_builder.native_builder.cache_clear()
