"""Several ranks in one test: forked from a warm server, each a launch's process, with a hard time limit.

The server imports torch and DeepSpeed once and starts no thread pool and no process group, so forking from it is safe
and takes half a second. A rank that fails or hangs fails the test with that rank's traceback.
"""

import multiprocessing
import os
import random
import socket
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection, wait
from typing import Any

from megatron_dept.topology.launch import Launch

TIME_LIMIT_SECONDS = 120


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *arguments: Any,
    limit: float = TIME_LIMIT_SECONDS,
    may_die: Collection[int] = (),
) -> list[Any]:
    """`function(launch, *arguments)` on every rank; their results in rank order, None of ranks that died as they may.

    `function` is a module-level function, its arguments and result picklable. Raises AssertionError with the first
    failing rank's traceback, or naming the ranks that did not end within `limit` seconds.
    """
    context = _server()
    port = free_port()
    pipes, processes = [], []
    for rank in range(world_size):
        reader, writer = context.Pipe(duplex=False)
        launch = Launch(rank, world_size, rank, world_size, "127.0.0.1", port)
        process = context.Process(target=_rank, args=(writer, launch, function, arguments), daemon=True)
        process.start()
        writer.close()
        pipes.append(reader)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + limit, may_die)
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port() -> int:
    """A port nobody listens on now, of this pytest worker's own range.

    Below the ports that systems hand out by themselves: no connection's own end takes it before it is listened on.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 10_000 + worker % 20 * 1_000
    while True:
        port = random.SystemRandom().randrange(first, first + 1_000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def _server() -> Any:
    os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", GOMP_SPINCOUNT="0")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.warm"])
    return context


def _rank(pipe: Connection, launch: Launch, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((True, function(launch, *arguments)))
    except BaseException:
        pipe.send((False, f"rank {launch.rank} of {launch.world_size}:\n{traceback.format_exc()}"))
    finally:
        pipe.close()
        # No destructor of a group whose peers have gone may hold the process.
        os._exit(0)


def _collect(pipes: list[Connection], deadline: float, may_die: Collection[int]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} of {len(pipes)} did not end in time")
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                fine, result = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                if rank in may_die:
                    results[rank] = None
                    continue
                raise AssertionError(f"rank {rank} died without a word") from None
            assert fine, result
            results[rank] = result
    return [results[rank] for rank in range(len(pipes))]
