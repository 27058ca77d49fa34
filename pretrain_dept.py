"""The main job: pre-train (or adapt) with DEPT.

deepspeed pretrain_dept.py RUN.yaml [--section.field VALUE ...] [--dry-run]
torchrun --nproc-per-node N pretrain_dept.py RUN.yaml ...
python pretrain_dept.py RUN.yaml ...                       one process, all sources in turn
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import NoReturn

from megatron_dept.common.cli import EXIT_INTERRUPTED, explain_refusal, positive_int
from megatron_dept.common.errors import EXIT_USER_ERROR, ConfigError, UserError
from megatron_dept.config.load import describe_fields, load_config
from megatron_dept.config.schema import RunConfig
from megatron_dept.topology.launch import Launch, discover_over_mpi, read_launch

GRACE_SECONDS = 5.0
"""A launcher ends all ranks when the first fails: those that leave the telling to another stay this long for it."""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are `ConfigError`s: one line, told once a node."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; {self.prog} --help lists the options")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This program's own flags, and what is left: dotted fields of the configuration."""
    parser = _Parser(
        prog="pretrain_dept.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="fields of RUN.yaml; with -- also flags:\n" + "\n".join(describe_fields()),
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="RUN.yaml", help="the run's configuration")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan of the run and end; nothing is allocated"
    )
    parser.add_argument(
        "--ranks", type=positive_int, default=None, help="with --dry-run: ranks to plan for (default: this launch's)"
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=None, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.ranks is not None and not arguments.dry_run:
        raise ConfigError("--ranks is for --dry-run alone; the launcher says how many ranks run")
    return arguments, overrides


def main(argv: Sequence[str], launch: Launch) -> int:
    """Run as told; the exit code: 0 finished, or asked to stop (`farewell` says what is saved)."""
    arguments, overrides = parse(argv)
    config = load_config(arguments.config, overrides)
    if arguments.dry_run:
        from megatron_dept.training.plan import build_plan, print_plan

        # Every rank makes the plan, so that all end alike where it cannot be made; one prints it.
        (print_plan if launch.rank == 0 else build_plan)(config, arguments.ranks or launch.world_size)
        return 0
    # Imported late: a mistake in the configuration is told at once, not after torch and DeepSpeed have loaded.
    from megatron_dept.training.setup import run

    launch = launch if launch.address else discover_over_mpi(launch)
    if not run(config, launch) and launch.rank == 0:
        print(farewell(config), flush=True)
    return 0


def farewell(config: RunConfig) -> str:
    """What becomes of a run that was asked to stop."""
    if config.federation.on_silo_loss == "continue":
        return (
            "left the federation as asked; the round in progress is not saved: the same command joins again from the "
            f"last boundary in {config.run_dir / 'checkpoints'}, or where the other silos are by then"
        )
    return f"stopped as asked; the same command goes on from {config.run_dir / 'checkpoints'}"


def guarded(argv: Sequence[str]) -> int:
    """`main`, with what a user can mend told in one line and everything else with its traceback."""
    launch = Launch(0, 1, 0, 1, "", 0)
    try:
        launch = read_launch()
        return main(argv, launch)
    except UserError as error:
        # Every rank finds the same mistake in a configuration; one line a node is enough.
        if launch.local_rank == 0 or not isinstance(error, ConfigError):
            _tell(launch, str(error))
        else:
            time.sleep(GRACE_SECONDS)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        if launch.local_rank == 0:
            print("stopped by the user", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except Exception as error:
        refusal = explain_refusal(error) if isinstance(error, OSError) else None
        if refusal is None:
            traceback.print_exc()
            return 1
        _tell(launch, refusal)
        return EXIT_USER_ERROR


def _tell(launch: Launch, message: str) -> None:
    where = f"rank {launch.rank}: " if launch.world_size > 1 else ""
    # One write, or the lines of ranks that share a terminal would mix.
    sys.stderr.write(f"error: {where}{' '.join(message.split())}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    # torch would print a C++ stack where a peer closes its socket; our error line says which peer and what to do.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    code = guarded(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # No destructor of a half-dead process group may keep this rank from leaving: the others wait for it to.
        os._exit(code)
