"""`processes: 8` starts that many processes of a script on this machine, as torchrun would."""

import os
import signal
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Literal

import torch

from warpcore.errors import UserError
from warpcore.processes import launched
from warpcore.signals import STOPPED_EARLY, stop_signals

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import PContext

SECONDS_BETWEEN_LOOKS = 0.1
GRACE_SECONDS = 10
"""Once a process has failed, the others have this long to end by themselves, as after the same error."""
LAUNCHER_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals for which PyTorch's launcher sets handlers of its own."""


def launch(wanted: int | Literal["all"] | None, device: str) -> int | None:
    """Start the command of this process again in each of `wanted` processes, and wait for them: their exit status.

    Returns None, having started nothing, where this process is to do the work: it is one of those, torchrun or Slurm
    has started it, or one process is wanted.

    Signals that ask for a stop go on to all of them, and are waited for without a limit, as a save may take long. The
    status is that of the first process that failed, else STOPPED_EARLY where they were asked to stop.

    Args:
        wanted: the key `processes`; None: as many as torchrun or Slurm has started, or this one alone.
        device: the key `device`.

    Raises:
        UserError: torchrun or Slurm has started another number, or this machine has too few GPUs.
    """
    if wanted is None:
        return None
    _, started, _ = launched()
    count = _count(wanted, device)
    if started > 1 or "RANK" in os.environ:
        if started != count:
            raise UserError(
                f"processes: {wanted} asks for {count}, but torchrun or srun has started {started}: write "
                "processes=null to take theirs, or start the script without them"
            )
        return None
    return None if count == 1 else _start(count)


def planned_processes(option: int | None, wanted: int | Literal["all"] | None) -> int:
    """Processes of a run that a tool plans: those of its option `--processes`, else of the config's key `processes`.

    Raises:
        UserError: the two contradict each other, or the key says `all`, which depends on the machine of the run.
    """
    if option is None and wanted == "all":
        raise UserError(
            "processes: all means one for each GPU of the machine that trains: say how many (--processes 8)"
        )
    if option is not None and wanted not in (None, "all", option):
        raise UserError(f"--processes {option} contradicts processes: {wanted} of the config; remove one")
    return option or (wanted if isinstance(wanted, int) else 1)


def _count(wanted: int | Literal["all"], device: str) -> int:
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if wanted == "all":
        if not gpus:
            raise UserError("processes: all means one for each GPU, and none is used here: write a number")
        return gpus
    if gpus and wanted > gpus:
        raise UserError(f"processes: {wanted}, but this machine has {gpus} GPUs; write processes: all, or a number")
    return wanted


def _start(count: int) -> int:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
    from torch.distributed.elastic.utils.distributed import get_free_port

    ours = {number: signal.getsignal(number) for number in LAUNCHER_SIGNALS}
    shared = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": get_free_port(),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        shared["OMP_NUM_THREADS"] = max(1, (os.cpu_count() or 1) // count)
    with tempfile.TemporaryDirectory() as logs:
        context = start_processes(
            name="processes",
            entrypoint=sys.executable,
            args={rank: tuple(sys.orig_argv[1:]) for rank in range(count)},
            envs={
                rank: {name: str(value) for name, value in (shared | {"RANK": rank, "LOCAL_RANK": rank}).items()}
                for rank in range(count)
            },
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        # The launcher's own handlers kill processes that take longer than 30 s to stop, which a save may.
        for number, handler in ours.items():
            signal.signal(number, handler)
        try:
            with stop_signals(lambda number: _send(context, number)):
                return _wait(context)
        except KeyboardInterrupt:  # a second Ctrl-C: at once
            context.close(signal.SIGINT)
            return 128 + signal.SIGINT
        finally:
            context.close()


def _send(context: "PContext", number: int) -> None:
    """To the processes that are left: each has a session of its own, so that it gets no Ctrl-C but this."""
    for handler in context.subprocess_handlers.values():
        if handler.proc.poll() is None:
            handler.proc.send_signal(number)


def _wait(context: "PContext") -> int:
    processes = [handler.proc for handler in context.subprocess_handlers.values()]
    failed, until = None, float("inf")
    while None in (found := [process.poll() for process in processes]):
        failure = next((status for status in found if status not in (None, 0, STOPPED_EARLY)), None)
        if failed is None and failure is not None:
            failed, until = failure, time.monotonic() + GRACE_SECONDS
        if time.monotonic() > until:
            break
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if failed is None:
        failed = next((status for status in found if status not in (0, STOPPED_EARLY)), None)
    status = max(found) if failed is None else failed
    return status if status >= 0 else 128 - status  # ended by a signal, as a shell counts
