"""Which sources train in a round, and on which silo: pure functions every rank evaluates alike."""

import itertools
from collections.abc import Mapping, Sequence

from megatron_dept.common.seeding import seed_for


def sample_sources(seed: int, round: int, names: Sequence[str], count: int) -> tuple[str, ...]:
    """Draw `count` of `names` uniformly without replacement (S_t of algorithm 1), in the order of `names`.

    Each source draws a number seeded by (seed, round, its name) and the `count` smallest are taken. So the sample is
    a pure function of its arguments, and which sources are drawn does not depend on the order they are listed in.
    Raises ValueError where `count` is not in 1..len(names) or a name is given twice.
    """
    if len(set(names)) != len(names):
        raise ValueError(f"names {list(names)} are not distinct; give each source a name of its own")
    if not 1 <= count <= len(names):
        raise ValueError(f"count {count} is not between 1 and the {len(names)} sources; set sources_per_round so")
    ranked = sorted(names, key=lambda name: (seed_for(seed, "sample", round, name), name))
    drawn = set(ranked[:count])
    return tuple(name for name in names if name in drawn)


def assign_slots(sampled: Sequence[str], silos: int) -> tuple[tuple[str | None, ...], ...]:
    """Lay a round's sources out as slots x silos: slot j, silo i trains sampled[j * silos + i].

    The last slot is filled up with None: that silo idles but joins the slot's collectives. ceil(len(sampled) / silos)
    slots; ValueError where `silos` is not positive.
    """
    if silos < 1:
        raise ValueError(f"silos {silos} is not positive; set parallel.silos to at least 1")
    slots = -(-len(sampled) // silos)
    padded = [*sampled, *[None] * (slots * silos - len(sampled))]
    return tuple(tuple(padded[slot * silos : (slot + 1) * silos]) for slot in range(slots))


def assign_home_slots(
    sampled: Sequence[str], homes: Mapping[str, int], silos: int
) -> tuple[tuple[str | None, ...], ...]:
    """Lay a round's sources out as slots x silos where each trains on its home silo alone, in the order of `sampled`.

    As many slots as the busiest silo has sources; a silo that has fewer idles in the last ones.
    """
    queues = [[name for name in sampled if homes[name] == silo] for silo in range(silos)]
    return tuple(itertools.zip_longest(*queues))
