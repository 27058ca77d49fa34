"""Seeds are of the meaning alone: the same anywhere, different for different meanings."""

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.common.seeding import generator_for, seed_for

parts = st.lists(st.text(max_size=5) | st.integers(), min_size=1, max_size=4)


def test_known_values_stay():
    """A change of these is a change of every seeded order. The first two are `b2sum -l 64` of the parts' form."""
    assert seed_for(1234, "documents", "de", 0) == 3517282463266827044
    assert seed_for("body", "layers.0.weight") == 6765229653582302612
    assert generator_for(1, "a").integers(1 << 30, size=3).tolist() == [371059459, 993901113, 1057387108]


@given(parts)
def test_a_seed_fits_every_generator(values):
    assert 0 <= seed_for(*values) < 1 << 63
    assert seed_for(*values) == seed_for(*values)


@given(parts, parts)
def test_other_meanings_have_other_seeds(left, right):
    """Of 2^63 seeds two drawn examples meet with a chance below 1e-14."""
    assert (seed_for(*left) == seed_for(*right)) == (left == right)


def test_where_one_part_ends_and_what_it_is_counts():
    different = [("ab", "c"), ("a", "bc"), ("abc",), ("a", "b", "c"), (1,), ("1",), (11, 1), (1, 11), ("a, 'b'",)]
    assert len({seed_for(*each) for each in different}) == len(different)


def test_another_process_draws_the_same():
    """Python's own hashes differ by process; seeds must not."""
    script = "from megatron_dept.common.seeding import seed_for; print(seed_for(7, 'order', 'de', 3))"
    command = [sys.executable, "-c", script]
    drawn = {
        subprocess.run(
            command, env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert drawn == {f"{seed_for(7, 'order', 'de', 3)}\n".encode()}


def test_generators_of_one_meaning_draw_the_same_and_of_two_do_not():
    one, again, other = generator_for(1, "a"), generator_for(1, "a"), generator_for(1, "b")
    drawn = one.integers(1 << 62, size=8)
    assert np.array_equal(drawn, again.integers(1 << 62, size=8))
    assert not np.intersect1d(drawn, other.integers(1 << 62, size=8)).size
