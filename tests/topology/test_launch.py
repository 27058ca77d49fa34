"""Who this process is, from each launcher's variables; what is half set is refused by name."""

import pytest

from megatron_dept.common.errors import ConfigError
from megatron_dept.topology.launch import Launch, read_launch

DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29501",
}
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29501",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}


@pytest.mark.parametrize("variables", [DEEPSPEED, TORCHRUN], ids=["deepspeed", "torchrun"])
def test_a_launchers_variables(variables):
    assert read_launch(variables) == Launch(5, 8, 1, 4, "10.0.0.7", 29501)


def test_no_launcher_is_one_process_alone():
    assert read_launch({"HOME": "/root", "LOCAL_RANK": "3"}) == Launch(0, 1, 0, 1, "127.0.0.1", 0)


def test_the_environment_is_read_where_none_is_given(monkeypatch):
    for name in {*DEEPSPEED, *TORCHRUN}:
        monkeypatch.delenv(name, raising=False)
    assert read_launch().world_size == 1
    for name, value in DEEPSPEED.items():
        monkeypatch.setenv(name, value)
    assert read_launch().rank == 5


def test_a_launcher_of_one_node_may_say_no_more_than_rank_and_world():
    assert read_launch({"RANK": "1", "WORLD_SIZE": "2"}) == Launch(1, 2, 0, 2, "127.0.0.1", 29500)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE"])
def test_half_a_launch_is_refused_by_the_missing_name(missing):
    variables = {name: value for name, value in DEEPSPEED.items() if name != missing}
    with pytest.raises(ConfigError) as caught:
        read_launch(variables)
    assert str(caught.value) == f"environment variable {missing} is not set; start with 'deepspeed' or 'torchrun'"


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_PORT"])
@pytest.mark.parametrize("value", ["", "-1", "two", "1.0", "²"])
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"^environment variable {name} is '{value}', not a number; start with "):
        read_launch({**DEEPSPEED, name: value})


def test_a_rank_outside_its_world():
    with pytest.raises(ConfigError, match="RANK 8 is not below WORLD_SIZE 8"):
        read_launch({**DEEPSPEED, "RANK": "8"})
