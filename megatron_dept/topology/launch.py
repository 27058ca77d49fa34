"""Who am I in this launch: rank, world and local rank from whichever launcher started the process."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dept.common.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """One process of a launch; `address` and `port` name the store that rank 0 serves (world of one: unused)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    address: str
    port: int


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """Read the variables that `deepspeed` and `torchrun` set; none of them set means one process alone.

    Raises `ConfigError` naming the variable where they are incomplete or not numbers.
    """
    env = os.environ if environment is None else environment
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return Launch(0, 1, 0, 1, "127.0.0.1", 0)

    def number(name: str, default: int | None = None) -> int:
        text = env.get(name, None if default is None else str(default))
        if text is None:
            raise ConfigError(f"environment variable {name} is not set; start with 'deepspeed' or 'torchrun'")
        if not text.isdecimal():
            raise ConfigError(
                f"environment variable {name} is {text!r}, not a number; start with 'deepspeed' or 'torchrun'"
            )
        return int(text)

    world = number("WORLD_SIZE")
    # torchrun's name first, DeepSpeed's second; a launcher that sets neither is taken to run on one node.
    local_world = number("LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE", world)
    launch = Launch(
        rank=number("RANK"),
        world_size=world,
        local_rank=number("LOCAL_RANK", 0),
        local_world_size=local_world,
        address=env.get("MASTER_ADDR", "127.0.0.1"),
        port=number("MASTER_PORT", 29500),
    )
    if launch.rank >= launch.world_size:
        raise ConfigError(f"environment variable RANK {launch.rank} is not below WORLD_SIZE {launch.world_size}")
    return launch
