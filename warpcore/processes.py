"""Which process this is, how it was launched (torchrun, Slurm or alone), and on which device it computes."""

import gc
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.rendezvous import rendezvous

from warpcore.errors import UserError

SILENT_SECONDS = 15
"""A process that waits longer for the others says so."""
Made = TypeVar("Made")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run. `mesh` (replicas x shards) exists with several, and to offload weights.

    Neighbouring ones may compute each sample together (sequence parallelism): `sequence_group` are those that this one
    does so with. They get the same data, which is counted once.
    """

    rank: int
    count: int
    device: torch.device
    mesh: DeviceMesh | None = field(default=None, compare=False)
    timeout: timedelta | None = None
    per_sample: int = 1
    """How many processes a `sequence_group` has."""
    sequence_group: dist.ProcessGroup | None = field(default=None, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the `data_count` shares of the data is this process's."""
        return self.rank // self.per_sample

    @property
    def data_count(self) -> int:
        return self.count // self.per_sample

    @property
    def counts_data(self) -> bool:
        """Whether this process is the one that counts its share of the data."""
        return self.rank % self.per_sample == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add `values`, of one shape everywhere, up over all processes, in place; every process gets the result."""
        if self.count > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value, group: dist.ProcessGroup | None = None):
        """`value` (picklable, from our own processes) of every process in the order of ranks, on every process.

        group: in which they meet; see `another_group`.
        """
        if self.count == 1:
            return [value]
        gathered = [None] * self.count
        dist.all_gather_object(gathered, value, group=group)
        return gathered

    def gather_of_data(self, value):
        """`gather`, of one process for each share of the data, in their order."""
        return self.gather(value)[:: self.per_sample]

    def any_beside(self, own: bool) -> bool:
        """Whether something is so for any process of the `sequence_group` (collective there)."""
        votes = torch.tensor(int(own))  # on the CPU, as a GPU's queue must not run dry
        if self.sequence_group is not None:
            dist.all_reduce(votes, group=self.sequence_group)
        return bool(votes)

    def in_groups(self, number: int) -> "Processes":
        """The same, of which `number` neighbouring ones compute each sample together (collective).

        Raises:
            UserError: it does not divide them.
        """
        check_divides("sequence_shards", number, self.count)
        if number == 1:
            return self
        first = self.rank // number * number
        group = dist.new_group(
            list(range(first, first + number)), timeout=self.timeout, use_local_synchronization=True
        )
        return replace(self, per_sample=number, sequence_group=group)

    def first_of(self, value):
        """The `value` of the first process that has one which is not None, on every process."""
        return next((one for one in self.gather(value) if one is not None), None)

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

    def on_main_at_length(self, make: Callable[[], Made]) -> Made:
        """`on_main`, for what may take longer than processes wait for each other: they hear that it goes on."""
        if self.count == 1:
            return make()
        with ThreadPoolExecutor(1) as pool:
            made = pool.submit(make) if self.is_main else None
            seconds = self.timeout.total_seconds() / 4
            while not self.on_main(lambda: bool(wait([made], seconds).done)):
                pass
            return self.on_main(lambda: made.result())

    def another_group(self, timeout: timedelta | None = None) -> dist.ProcessGroup | None:
        """All processes once more, over gloo: for collectives that must not mix with those of training.

        timeout: how long one waits in such a collective, if it is not `process_timeout_seconds`.
        """
        if self.count == 1:
            return None
        with _no_longer_than(self.timeout):
            return dist.new_group(backend="gloo", timeout=timeout or self.timeout)


def start_processes(
    device: str,
    use_fsdp: bool = False,
    fsdp_shards: int | None = None,
    timeout_seconds: float = 1800,
    cpu_offload: bool = False,
    per_sample: int = 1,
) -> Processes:
    """Join the process group when there are several processes; choose the device.

    Args:
        use_fsdp: shard networks over the processes; else each holds a whole copy.
        fsdp_shards: how many processes share one copy; by default all of them.
        timeout_seconds: a process waits no longer than this for the others; then it raises.
        cpu_offload: make a group of a single process, too: sharding is what keeps weights in the CPU's memory.
        per_sample: how many neighbouring processes compute each sample together.

    Raises:
        UserError: launch variables that are only half set, a device that is not there, shards that do not divide, or
            the others can't be met.
    """
    rank, count, local_rank = launched()
    if rank >= count:
        raise UserError(f"process {rank} of {count}: ranks go from 0 to {count - 1}; launch with torchrun or srun")
    place = choose_device(device, local_rank)
    check_divides("sequence_shards", per_sample, count)
    if count == 1 and not cpu_offload:
        return Processes(0, 1, place)
    if place.type == "mps":
        raise UserError("MPS takes one process, without fsdp_cpu_offload: start one, or write device: cpu")
    shards = (fsdp_shards or count) if use_fsdp else 1
    check_divides("fsdp_shards", shards, count)
    timeout = timedelta(seconds=timeout_seconds)
    # Tensors on the CPU (states of the data, decisions) travel over gloo, those on a GPU over NCCL. Written as
    # "cpu:gloo", a group would have no default backend, and PyTorch would warn of that as the group is destroyed.
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    with _no_longer_than(timeout):
        store = dist.HashStore() if count == 1 else _meet(rank, count, timeout)
        dist.init_process_group(backend, rank=rank, world_size=count, timeout=timeout, store=store)
        mesh = _mesh(place.type, rank, count, shards, timeout)
        return Processes(rank, count, place, mesh, timeout).in_groups(per_sample)


def check_divides(key: str, number: int, count: int) -> None:
    """Raise UserError, which names the key, for a number that does not divide that of the processes."""
    if count % number:
        fitting = ", ".join(str(one) for one in range(1, count + 1) if count % one == 0)
        raise UserError(f"{key}: {number} does not divide the {count} processes; write one of {fitting}")


_met: dist.Store | None = None
"""Where this process last met the others."""


def meet_others(timeout: timedelta | None = None) -> tuple[dist.Store, int, int] | None:
    """Where this process met the others of the run, its rank, and their number; None where it has met none.

    timeout: how long it waits for them where they have not met yet; by default it does not.

    Raises:
        UserError: they can't be met.
    """
    rank, count, _ = launched()
    if count == 1 or (_met is None and timeout is None):
        return None
    return _met or _meet(rank, count, timeout), rank, count


def _meet(rank: int, count: int, timeout: timedelta) -> dist.Store:
    global _met
    _met = _meeting_point(rank, count, timeout)
    return _met


def _meeting_point(rank: int, count: int, timeout: timedelta) -> dist.Store:
    """Where the processes of this start find each other's addresses.

    torchrun may keep it over its restarts: the addresses of processes that are gone must not be found there. (Several
    machines count their restarts apart, so this holds on one.)
    """
    try:
        store, _, _ = next(rendezvous("env://", rank, count, timeout=timeout))
    except dist.DistError as error:
        raise UserError(
            f"process {rank} of {count} can't meet the others at {_address()} (MASTER_ADDR, MASTER_PORT): "
            f"{str(error).splitlines()[0]}"
        ) from error
    store.set_timeout(timeout)
    return dist.PrefixStore(f"start{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _mesh(device_type: str, rank: int, count: int, shards: int, timeout: timedelta) -> DeviceMesh:
    """Replicas x shards: neighbouring ranks, which are often on one machine, share a copy of the networks.

    `init_device_mesh` would do, if it took a timeout: sharded training waits for others in these groups.
    """
    ranks = torch.arange(count).view(-1, shards)
    own = [ranks[:, rank % shards], ranks[rank // shards]]
    groups = [dist.new_group(one.tolist(), timeout=timeout, use_local_synchronization=True) for one in own]
    return DeviceMesh.from_group(groups, device_type, mesh=ranks, mesh_dim_names=("replicas", "shards"))


@contextmanager
def _no_longer_than(timeout: timedelta) -> Iterator[None]:
    """End this process when meeting the others takes longer: gloo itself waits five times as long for a connection."""
    others = "MASTER_ADDR" in os.environ
    watches = [threading.Timer(timeout.total_seconds(), _give_up, (timeout,))] if others else []
    if others and timeout.total_seconds() > SILENT_SECONDS:
        watches.append(threading.Timer(SILENT_SECONDS, _say_so, (timeout,)))
    for watch in watches:
        watch.daemon = True
        watch.start()
    try:
        yield
    finally:
        for watch in watches:
            watch.cancel()


def _say_so(timeout: timedelta) -> None:
    print(
        f"waiting for the other processes of the run at {_address()}, up to {timeout.total_seconds():g} s "
        "(process_timeout_seconds)", file=sys.stderr, flush=True,
    )  # fmt: skip


def _give_up(timeout: timedelta) -> None:
    print(
        f"the processes of the run did not meet at {_address()} within {timeout.total_seconds():g} s "
        "(process_timeout_seconds): one ended, gave no answer or never came; its own output, or that of its machine, "
        "says why", file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(1)  # the thread that waits can't be interrupted


def stop_processes() -> None:
    """Leave the process group. Models must be dropped first: destroying it under them can abort the interpreter."""
    gc.collect()
    if dist.is_initialized() and not _ALONE.get():
        dist.destroy_process_group()


_ALONE = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one, whatever has started it: for what asks the others nothing."""
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_ID")


def launched() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) from torchrun's variables, else Slurm's, else (0, 1, 0).

    Several processes then find each other at MASTER_ADDR and MASTER_PORT. Inside `alone` there is this one.
    """
    if _ALONE.get():
        return 0, 1, 0
    if any(name in os.environ for name in _TORCHRUN):
        rank, count, local_rank = _numbers(_TORCHRUN, "launch with torchrun, or unset them")
        if count > 1:
            _require(("MASTER_ADDR", "MASTER_PORT"), "torchrun sets them; or export the first machine's address")
        return rank, count, local_rank
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":  # set by srun; a batch script alone is one process
        rank, count, local_rank, job, step = _numbers(_SRUN, "start the processes with srun")
        if "MASTER_ADDR" not in os.environ:
            _require(["SLURM_STEP_NODELIST"], "start the processes with srun")
            os.environ["MASTER_ADDR"] = _first_node(os.environ["SLURM_STEP_NODELIST"])
        # Jobs that share a node, and steps of one job, meet at different ports, below those Linux gives away itself.
        os.environ.setdefault("MASTER_PORT", str(20_000 + (job + 101 * step) % 12_000))
        return rank, count, local_rank
    return 0, 1, 0


def _require(names: Sequence[str], advice: str) -> None:
    missing = [name for name in names if name not in os.environ]
    if missing:
        there = [name for name in (*_TORCHRUN, *_SRUN) if name in os.environ]
        raise UserError(f"{', '.join(there)} set but not {', '.join(missing)}: {advice}")


def _numbers(names: Sequence[str], advice: str) -> list[int]:
    _require(names, advice)
    for name in names:
        if not os.environ[name].isdecimal():
            raise UserError(f"{name} is {os.environ[name]!r}, not a number: {advice}")
    return [int(os.environ[name]) for name in names]


def _first_node(nodes: str) -> str:
    """An address of the first node of a Slurm list such as `gpu[03-07,12]`."""
    name = _scontrol("show", "hostnames", nodes).split()[0]
    try:
        socket.getaddrinfo(name, None)
        return name
    except OSError:  # a name that Slurm alone knows
        address = re.search(r"\bNodeAddr=(\S+)", _scontrol("show", "node", name, "--oneliner"))
        if address is None:
            raise UserError(f"Slurm gives no address for node {name}: export its MASTER_ADDR before srun") from None
        return address[1]


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(
            ("scontrol", *arguments), check=True, capture_output=True, text=True, encoding="utf-8", timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"can't ask Slurm for the first node: {error}. Export its MASTER_ADDR before srun") from error


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
