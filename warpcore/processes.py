"""Which process this is, how it was launched (torchrun, Slurm or alone), and on which device it computes."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from warpcore.errors import UserError

Made = TypeVar("Made")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. `mesh` (replicas x shards) exists only with several."""

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh | None = field(default=None, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add `values` up over all processes; every process gets the result."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def all_true(self, value: torch.Tensor) -> torch.Tensor:
        """Whether `value` (0-d, bool) is true on every process, on the device."""
        return value if self.count == 1 else self.sum((~value).int()) == 0

    def gather(self, value):
        """`value` (picklable, from our own processes) of every process in the order of ranks, on every process."""
        if self.count == 1:
            return [value]
        gathered = [None] * self.count
        dist.all_gather_object(gathered, value)
        return gathered

    def decide(self, value):
        """The main process's `value`, on every process."""
        return self.on_main(lambda: value)

    def on_main(self, make: Callable[[], Made]) -> Made:
        """What `make` gives on the main process, on every process; so is the UserError that it raises."""
        if self.count == 1:
            return make()
        box = [None, None]
        if self.is_main:
            try:
                box[0] = make()
            except UserError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return box[0]


def start_processes(device: str, use_fsdp: bool) -> Processes:
    """Join the process group when there are several processes; choose the device.

    Raises:
        UserError: launch variables that are only half set, or a device that is not there.
    """
    rank, count, local_rank = _launch()
    place = choose_device(device, local_rank)
    if count == 1:
        return Processes(0, 1, place)
    if place.type == "mps":
        raise UserError("several processes cannot share MPS: start one, or write device: cpu")
    # Tensors on the CPU (states of the data, decisions) travel over gloo, those on a GPU over NCCL.
    dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "cpu:gloo", rank=rank, world_size=count)
    shards = count if use_fsdp else 1
    mesh = init_device_mesh(place.type, (count // shards, shards), mesh_dim_names=("replicas", "shards"))
    return Processes(rank, count, place, mesh)


def stop_processes() -> None:
    """Leave the process group. Models must be dropped first: destroying it under them can abort the interpreter."""
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def _launch() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) from torchrun's variables, else Slurm's, else (0, 1, 0)."""
    env = os.environ
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [name for name in names if name in env]
    if given:
        if len(given) < len(names):
            missing = ", ".join(name for name in names if name not in env)
            raise UserError(f"{', '.join(given)} set but not {missing}: launch with torchrun, or unset them")
        return tuple(int(env[name]) for name in names)
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun; a batch script alone is one process
        if "MASTER_ADDR" not in env and int(env.get("SLURM_NNODES", 1)) > 1:
            raise UserError("MASTER_ADDR is not set: export the first node's address, as example_train.sh does")
        env.setdefault("MASTER_ADDR", "127.0.0.1")
        env.setdefault("MASTER_PORT", str(20_000 + int(env["SLURM_JOB_ID"]) % 20_000))
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU; with several GPUs, that of `local_rank`.

    Raises:
        UserError: the device is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(name for name in there if there[name]) if wanted == "auto" else wanted
    if not there[kind]:
        raise UserError(f"device: {kind} is not available here; write device: auto")
    if kind != "cuda":
        return torch.device(kind)
    if torch.cuda.device_count() == 1:
        local_rank = 0  # with --gpus-per-task=1 each process sees only its own
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {local_rank}, but this machine has {torch.cuda.device_count()} GPUs")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def choose_dtype(wanted: str | None, device: torch.device) -> torch.dtype:
    """The precision to compute in: by default bfloat16 on CUDA, else float32."""
    return getattr(torch, wanted or ("bfloat16" if device.type == "cuda" else "float32"))


@contextmanager
def stop_signals(handle: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM, SIGUSR1 and the first Ctrl-C ask for a stop after the current update."""

    def received(number, frame):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C stops at once
        handle(number)

    before = {number: signal.signal(number, received) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
