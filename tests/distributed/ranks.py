"""Checks that run on several ranks at once: one set of processes a world size, gloo on the CPU."""

import datetime
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

Check = Callable[[Path], None]

# Imported once, by the process that the ranks are forked from.
PRELOADED = [
    "fastzoo.nn",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "pytest",
]
# What a rank found wrong in the check that runs. It goes on: an exception would leave the others
# at a collective.
_wrong: list[str] = []


def expect(right: bool, what: str) -> None:
    if not right:
        _wrong.append(what)


def same(actual: Tensor | None, expected: Tensor | None, what: str, rtol: float = 1e-9) -> None:
    try:
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol / 100)
    except AssertionError as error:
        _wrong.append(f"{what}: {error}")


def run(checks: dict[str, Check], world: int, folder: Path) -> dict[str, str]:
    """What went wrong, by check; a check that is not named passed on every rank.

    Processes are dear, so all checks run in the same ones, in order. After an exception the ranks
    may be at different collectives: the checks after it do not run, and say so.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    errors = context.SimpleQueue()
    args = (checks, world, folder, errors)
    workers = mp.start_processes(_rank, args, nprocs=world, join=False, start_method="forkserver")
    found: dict[str, str] = {}
    ended, died = False, ""
    while not ended or not errors.empty():
        try:
            ended = ended or workers.join(timeout=0.1)
        except mp.ProcessExitedException as error:
            ended, died = True, f"\n{error}"
        while not errors.empty():
            name, text = errors.get()
            found[name] = found.get(name, "") + text
    return {name: found.get(name, "") + died for name in checks if died or name in found}


def _rank(rank: int, checks: dict[str, Check], world: int, folder: Path, errors: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init-{world}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    broken = None
    for name, check in checks.items():
        torch.manual_seed(0)
        _wrong.clear()
        try:
            if broken is not None:
                raise RuntimeError(f"did not run, after {broken}")
            check(folder)
        except Exception:
            broken = broken or name
            _wrong.append(traceback.format_exc())
        if _wrong:
            errors.put((name, "\n".join([f"\nrank {rank} of {world}:", *_wrong])))
    dist.barrier()
    # Every check is over everywhere. Ended in order, gloo's threads now and then abort the process.
    os._exit(0)
