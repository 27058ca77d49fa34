"""Rank arithmetic: places and ranks are inverse, peers partition the launch, and what does not divide is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_dept.common.errors import ConfigError
from megatron_dept.config.schema import ParallelConfig
from megatron_dept.topology.layout import Coordinate, Layout, SiloShape, accumulation_steps

sizes = st.integers(1, 5)
equal_layouts = st.builds(Layout.of_equal, silos=sizes, pipe=sizes, data=sizes, tensor=sizes)
shapes = st.builds(SiloShape, pipe=st.integers(1, 3), data=st.integers(1, 3), tensor=st.integers(1, 3))
layouts = equal_layouts | st.lists(shapes, min_size=1, max_size=5).map(lambda shapes: Layout(tuple(shapes)))


@given(layouts)
def test_every_rank_has_a_place_of_its_own_and_back(layout):
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert len(set(places)) == layout.world_size
    assert [layout.rank(place) for place in places] == list(range(layout.world_size))
    for place in places:
        shape = layout.shapes[place.silo]
        assert place.pipe < shape.pipe and place.data < shape.data and place.tensor < shape.tensor


@given(layouts)
def test_ranks_run_silo_pipe_data_tensor_outermost_first(layout):
    """A silo is a run of neighbouring ranks; inside it the order is DeepSpeed's own, tensor ranks side by side."""
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    assert places == sorted(places, key=lambda place: (place.silo, place.pipe, place.data, place.tensor))


@given(layouts)
def test_silos_partition_the_ranks(layout):
    members = [layout.members(silo) for silo in range(layout.silos)]
    assert [rank for silo in members for rank in silo] == list(range(layout.world_size))
    for silo, ranks in enumerate(members):
        assert ranks[0] == layout.offset(silo) and len(ranks) == layout.shapes[silo].size
        assert {layout.coordinate(rank).silo for rank in ranks} == {silo}


@given(layouts)
def test_embedding_ranks_are_the_first_stages(layout):
    first = [rank for rank in range(layout.world_size) if layout.coordinate(rank).pipe == 0]
    assert list(layout.embedding_ranks()) == first
    assert sum(shape.embedding_ranks for shape in layout.shapes) == len(first)


@given(equal_layouts)
def test_peers_partition_the_launch(layout):
    assert layout.equal
    places = [layout.coordinate(rank) for rank in range(layout.world_size)]
    groups = {layout.peers(place) for place in places}
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for rank, here in enumerate(places):
        for silo, peer in enumerate(layout.peers(here)):
            assert layout.coordinate(peer) == Coordinate(silo, here.pipe, here.data, here.tensor)
        assert layout.peers(here)[here.silo] == rank


def test_silos_that_cut_the_body_differently_are_not_equal():
    """Also where they have as many ranks."""
    assert not Layout((SiloShape(1, 2, 1), SiloShape(1, 1, 2))).equal
    assert not Layout((SiloShape(1, 2, 1, zero_stage=1), SiloShape(1, 2, 1, zero_stage=3))).equal


def test_shapes_are_taken_as_they_are_or_refused():
    parallel = ParallelConfig(
        zero_stage=1, shapes=[{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 3}]
    )
    assert Layout.cut(parallel, 5) == Layout((SiloShape(1, 1, 2), SiloShape(3, 1, 1)))
    with pytest.raises(
        ConfigError, match=r"^parallel\.shapes are silos of 2, 3 ranks, 5 in all, but 4 were launched; "
    ):
        Layout.cut(parallel, 4)


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
        assert (layout.silos, layout.shapes[0].data, layout.world_size) == (silos, world // silos, world)


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
