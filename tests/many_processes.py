"""Run a function in two processes that talk over gloo, as a test."""

import gc
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_two_processes(function: Callable, *args) -> None:
    """`function(*args)` in each of two processes of one process group; an exception in one is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_member, args=(f"file://{Path(folder) / 'meeting'}", function, args), nprocs=2)


def _member(rank: int, meeting: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("cpu:gloo", init_method=meeting, rank=rank, world_size=2)
    function(*args)
    # Networks that outlive the process group can abort the interpreter at its exit.
    gc.collect()
    dist.destroy_process_group()
