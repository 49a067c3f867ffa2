"""Run a function in several processes that talk over gloo, as a test."""

import gc
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

THREADS = int(os.environ.get("TEST_THREADS", 1))
"""Small tensors gain nothing from threads, and on a busy machine threads that wait for each other cost a lot. `make
test-bits` takes two as well."""
# Processes are forked from a server that has imported the slow things, but has started no thread.
SLOW_IMPORTS = [
    "torch._dynamo", "torch.distributed.fsdp", "open_clip", "warpcore.core",
    "tests.train.test_every_script",  # and with it the libraries of all families, 1.7 s of a processor
]  # fmt: skip
multiprocessing.get_context("forkserver").set_forkserver_preload(SLOW_IMPORTS)


def run_in_two_processes(function: Callable, *args) -> None:
    """`function(*args)` in each of two processes of one process group; an exception in one is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{Path(folder) / 'meeting'}"
        mp.start_processes(
            _member, args=(dict(os.environ), meeting, function, args), nprocs=2, start_method="forkserver"
        )


def launch_processes(count: int, function: Callable, *args) -> None:
    """`function(*args)` in each of `count` processes, as a launcher starts them: `function` joins the group itself."""
    arguments = (dict(os.environ), count, free_port(), function, args)
    mp.start_processes(_launched, args=arguments, nprocs=count, start_method="forkserver")


def free_port() -> int:
    """One below those that Linux gives to connections; tests that run at a time begin to look at different ones."""
    for number in range(12_000):
        port = 20_000 + (101 * os.getpid() + number) % 12_000
        with socket.socket() as tried:
            try:
                tried.bind(("", port))
            except OSError:
                continue  # taken
            return port
    raise AssertionError("no port is free")


def _launched(rank: int, environment: dict, count: int, port: int, function: Callable, args: tuple) -> None:
    torch.set_num_threads(THREADS)
    # That of the server is as old as the first test that started a process: a test's S3 endpoint is not in it.
    os.environ |= environment | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    function(*args)


def _member(rank: int, environment: dict, meeting: str, function: Callable, args: tuple) -> None:
    torch.set_num_threads(THREADS)
    os.environ |= environment
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    function(*args)
    # Networks that outlive the process group can abort the interpreter at its exit.
    gc.collect()
    dist.destroy_process_group()
