"""What a few updates of a run do, moment by moment: a trace, and on CUDA a snapshot of the memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

UNSEEN, SEEN = 3, 3
"""Updates before the trace, in which memory and kernels settle, and updates in it."""
MOST_MEMORY_EVENTS = 200_000


@contextmanager
def profiled(folder: Path, device: torch.device) -> Iterator[profile]:
    """Inside, `step()` of what is given ends an update. `folder` gets trace.json.gz after `UNSEEN + SEEN` of them.

    chrome://tracing and https://ui.perfetto.dev show it; https://docs.pytorch.org/memory_viz shows memory.pickle.
    """
    on_cuda = device.type == "cuda"

    def write(recorded: profile) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(folder / "trace.json.gz"))
        if on_cuda:
            torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    if on_cuda:
        torch.cuda.memory._record_memory_history(max_entries=MOST_MEMORY_EVENTS)
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])],
        schedule=schedule(wait=UNSEEN - 1, warmup=1, active=SEEN, repeat=1),
        on_trace_ready=write,
        record_shapes=True,
        profile_memory=True,
        acc_events=True,  # there is one cycle: nothing to clear, and no warning of it
    ) as recorder:
        yield recorder
