"""Rank arithmetic: places and ranks are inverse, peers partition the launch, and what does not divide is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.common.errors import ConfigError
from megatron_dept.config.schema import ParallelConfig
from megatron_dept.topology.layout import Coordinate, Layout, accumulation_steps

sizes = st.integers(1, 5)
layouts = st.builds(Layout, silos=sizes, pipe=sizes, data=sizes, tensor=sizes)


@given(layouts)
def test_every_rank_has_a_place_of_its_own_and_back(layout):
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size
    assert [layout.rank(place) for place in places] == list(range(layout.world_size))
    for place in places:
        assert place.silo < layout.silos and place.pipe < layout.pipe
        assert place.data < layout.data and place.tensor < layout.tensor


@given(layouts)
def test_ranks_run_silo_pipe_data_tensor_outermost_first(layout):
    """A silo is a run of neighbouring ranks; inside it the order is DeepSpeed's own, tensor ranks side by side."""
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert places == sorted(places, key=lambda place: (place.silo, place.pipe, place.data, place.tensor))


@given(layouts)
def test_peers_partition_the_launch(layout):
    groups = {layout.peers(rank) for rank in range(layout.world_size)}
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for rank in range(layout.world_size):
        here = layout.coordinate(rank)
        for silo, peer in enumerate(layout.peers(rank)):
            assert layout.coordinate(peer) == Coordinate(silo, here.pipe, here.data, here.tensor)
        assert layout.peers(rank)[here.silo] == rank


@given(st.integers(1, 6), st.integers(1, 48))
def test_the_cut_uses_every_rank_or_refuses(silos, world):
    parallel = ParallelConfig(silos=silos)
    if world % silos:
        with pytest.raises(
            ConfigError, match=rf"^{world} ranks cannot be cut into parallel\.silos {silos} .*; launch a "
        ):
            Layout.cut(parallel, world)
    else:
        layout = Layout.cut(parallel, world)
        assert (layout.silos, layout.data, layout.world_size) == (silos, world // silos, world)


def test_the_refusal_names_what_would_do():
    with pytest.raises(ConfigError) as caught:
        Layout.cut(ParallelConfig(silos=3), 4)
    assert str(caught.value) == (
        "4 ranks cannot be cut into parallel.silos 3 x pipe 1 x tensor 1; "
        "launch a multiple of 3 ranks or set parallel.silos to a divisor of 4"
    )


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_micro_batches_make_up_the_batch_or_are_refused(batch, micro, data):
    if batch % (micro * data):
        with pytest.raises(
            ConfigError, match=rf"global_batch_size {batch} is not .* set it to a multiple of {micro * data}$"
        ):
            accumulation_steps(batch, micro, data)
    else:
        assert accumulation_steps(batch, micro, data) * micro * data == batch
