"""What the GPU tests run in processes of their own: DeepSpeed chooses its accelerator once a process.

`make gpu-check` runs them. Where MEGATRON_DEPT_REHEARSE_GPU is 1 the "GPU" is the CPU: it shows that the tests
themselves work, nothing else. Shapes: `b` sequences, `s` tokens, `h` hidden.
"""

import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_dept.config.load import validate_config
from megatron_dept.topology.launch import Launch

ROOT = Path(__file__).resolve().parents[2]
REHEARSAL = os.environ.get("MEGATRON_DEPT_REHEARSE_GPU") == "1"
VOCABULARY, SEQUENCE, BATCH = 101, 32, 4
_CHILD = (
    "import pickle, sys; function, arguments, path = pickle.load(sys.stdin.buffer); "
    "result = function(*arguments); pickle.dump(result, open(path, 'wb'))"
)


def gpu_or_skip() -> str:
    """The device that the tests run on."""
    if REHEARSAL:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU here; make gpu-check runs this on one")
    return "cuda"


def run_apart(device: str, function: Callable[..., Any], *arguments: Any, limit: float = 240) -> Any:
    """`function(*arguments)` of an importable module in a process of its own on `device`; its failure is an error."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        done = subprocess.run(
            [sys.executable, "-c", _CHILD],
            input=pickle.dumps((function, arguments, str(path))),
            env=os.environ | {"DS_ACCELERATOR": device, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
            cwd=ROOT,
            capture_output=True,
            timeout=limit,
        )
        assert done.returncode == 0, (done.stdout + done.stderr).decode(errors="replace")[-4000:]
        return pickle.loads(path.read_bytes())


def engine_steps(precision: str, zero_stage: int, checkpointing: bool) -> dict[str, Any]:
    """Three steps of a silo's engine with body and embedding: losses, norms, and by how much everything has moved."""
    from megatron_dept.common.seeding import generator_for
    from megatron_dept.engine.embedding_owner import EmbeddingOwner
    from megatron_dept.engine.silo_engine import SiloEngine
    from megatron_dept.engine.world import start_world
    from megatron_dept.models.build import build_body
    from megatron_dept.models.embedding import SourceEmbedding
    from megatron_dept.models.initialise import init_rows
    from megatron_dept.topology.layout import Layout

    config = validate_config(
        {
            "run_dir": "unused",
            "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "seq_length": SEQUENCE},
            "sources": [{"name": "drawn", "data": "unused"}],
            "parallel": {"zero_stage": zero_stage},
            # A large epsilon keeps the update a smooth function of the gradient.
            "optimizer": {"epsilon": 1e-2, "clip_grad": 0.5},
            "training": {
                "precision": precision,
                "micro_batch_size": BATCH // 2,
                "global_batch_size": BATCH,
                "activation_checkpointing": checkpointing,
                "loss_chunk_tokens": 48,
            },
        },
        "gpu test",
    )
    world = start_world(Launch(0, 1, 0, 1, "127.0.0.1", 0), Layout.cut(config.parallel, 1), 60)
    assert world.device.type == os.environ["DS_ACCELERATOR"], f"the engine is on {world.device}"
    engine = SiloEngine(config, build_body(config.model, 1, checkpointing), world)
    token, position = (
        init_rows(0, rows, 64, 0.5, name) for rows, name in ((VOCABULARY, "token"), (SEQUENCE, "position"))
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    module = SourceEmbedding(token.clone(), position.clone(), dtype, config.training.loss_chunk_tokens)
    owner = EmbeddingOwner(module.to(world.device), config.optimizer, world)
    start, results = engine.shards.read().cpu(), []
    for step in range(3):
        drawn = torch.from_numpy(generator_for("batch", step).integers(0, VOCABULARY, (BATCH, SEQUENCE + 1)))
        batches = [(piece[:, :-1].contiguous(), piece[:, 1:].contiguous()) for piece in drawn.to(world.device).chunk(2)]
        results.append(engine.train_step(batches, owner, 3e-3, 3e-3, want_activation_norm=True))
    moved = {segment.name: (engine.shards.read().cpu() - start)[segment.place] for segment in engine.shards.segments}
    moved |= {"token": module.token.detach().cpu() - token}
    assert module.position is not None
    moved |= {"position": module.position.detach().cpu() - position}
    return {
        "losses": [result.loss for result in results],
        "norms": [result.gradient_norm for result in results],
        "moved": {name: value.numpy() for name, value in moved.items()},
        "scored": engine.token_losses(module, *batches[0]).cpu().numpy(),
    }


def collectives(device: str) -> dict[str, bool]:
    """Every collective of a group of one over the device's transport, for each dtype that travels."""
    import torch.distributed as dist

    from megatron_dept.federation.communicator import GroupCommunicator, join_peers
    from megatron_dept.federation.ledger import Ledger

    where = torch.device(device)
    group = join_peers(dist.HashStore(), "one", 0, 1, where, 60)
    peers = GroupCommunicator(group, Ledger(), "federation", torch.device("cpu"))
    found: dict[str, bool] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.uint8, torch.int8, torch.int32, torch.int64):
        sent = torch.arange(24, device=where).to(dtype)
        name = str(dtype).removeprefix("torch.")
        found[f"all_to_all {name}"] = torch.equal(peers.all_to_all(sent, [24], [24], "body"), sent)
        found[f"all_gather {name}"] = torch.equal(peers.all_gather(sent, "body"), sent)
    for dtype in (torch.float32, torch.bfloat16):
        sent = torch.arange(24, device=where).to(dtype)
        summed, largest = sent.clone(), sent.clone()
        peers.all_reduce_sum(summed, "activation")
        peers.all_reduce_max(largest, "activation")
        peers.broadcast(summed, 0, "body")
        name = str(dtype).removeprefix("torch.")
        found[f"all_reduce {name}"] = torch.equal(summed, sent) and torch.equal(largest, sent)
        found[f"reduce_scatter {name}"] = torch.equal(peers.reduce_scatter_sum(sent, "activation"), sent)
        mine, gathered = torch.zeros_like(sent), [torch.zeros_like(sent)]
        peers.start_reduce_scatter_sum(sent, mine, "body").wait()
        peers.start_all_gather(sent, gathered, "body").wait()
        peers.start_all_to_all([sent], gathered, "body").wait()
        # Of a group of one nothing is sent: what is a rank's own is left alone.
        found[f"started {name}"] = torch.equal(mine, sent) and not gathered[0].any()
    found["objects"] = peers.all_gather_object({"of": "the host"}) == [{"of": "the host"}]
    peers.barrier()
    peers.wait_for_all(lambda: None)
    peers.close()
    return found


def body_hashes(device: str) -> tuple[int, int]:
    """The hash of one partition as it lies on the device, and in host memory."""
    from megatron_dept.common.segments import Segment
    from megatron_dept.training.body_hash import hash_partition

    flat: Tensor = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    segments = [Segment("a", 0, 3000, 0), Segment("b", 100, 2100, 3000)]
    shapes = {"a": [3000], "b": [50, 60]}
    return hash_partition(flat.to(device), segments, shapes), hash_partition(flat, segments, shapes)


def whole_run(config: Any) -> bool:
    """The whole program in this one process."""
    from megatron_dept.training.setup import run

    return run(config, Launch(0, 1, 0, 1, "127.0.0.1", 0))
