"""Part `steps` of `benchmarks/gpu.py`: what an update costs at the published sizes (`benchmarks/train_step.py`)."""

import time
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.flops import dense_peak
from benchmarks.gpu_part import Bench, Outcome, Part, Row
from benchmarks.techniques import techniques
from benchmarks.train_step import GIB, PLAIN_LOOP, Case, free, make_ours, measure, published, small, update_flops

PROFILED_UPDATES = 3
PROFILED_SECONDS = 60
"""Kept free at the end of the part for the profile."""
SHOWN_KERNELS = 5
MEMORY_FOR_BATCH_8 = 100 * GIB
"""Of a GPU: with less, the 3.6B is trained in full with batches of 4."""
NUM_FIRST = 5
"""Cases that are measured before anything else: those with targets."""


@dataclass(frozen=True)
class Target:
    """What our update of a case should reach; None where nothing is asked."""

    gain: float | None = None
    """Times as fast as diffusers' network in the plain loop."""
    utilisation: float | None = None
    seconds: float | None = None
    gib: float | None = None

    def describe(self) -> str:
        parts = [
            self.gain and f">= {self.gain:g}x", self.utilisation and f">= {self.utilisation:.0%} of peak",
            self.seconds and f"<= {self.seconds:g} s", self.gib and f"<= {self.gib:g} GiB",
        ]  # fmt: skip
        return ", ".join(part for part in parts if part)

    def met(self, seconds: float, memory: int, gain: float | None, utilisation: float | None) -> bool:
        """Whether the figures reach it; one that could not be measured does not."""
        return (
            (self.gain is None or (gain is not None and gain >= self.gain))
            and (self.utilisation is None or (utilisation is not None and utilisation >= self.utilisation))
            and (self.seconds is None or seconds <= self.seconds)
            and (self.gib is None or memory <= self.gib * GIB)
        )


TARGETS = {
    "Stage C 3.6B full 1024 px, batch 8": Target(gain=2.0, utilisation=0.55),
    "Stage C 3.6B full 1024 px, batch 4": Target(gain=2.0, utilisation=0.55),
    "Stage C 3.6B LoRA 1024 px, batch 3": Target(seconds=0.22, gib=16),
    "Stage B 3B full 768 px, batch 4": Target(gain=1.8),
    "Stage B 700M full 1024 px, batch 4": Target(gain=1.8),
}
"""By case; the LoRA's are for an H100."""

_MEASURED: list[tuple[float, Case]] = []
"""Seconds per useful TFLOP of our update, and the case."""


def cases(bench: Bench) -> list[Case]:
    """The most important ones first; latents and conditions are given, as a cache gives them."""
    if bench.tiny:
        return small()[:1] + small()[4:5]
    every = published()
    lora = next(case for case in every if case.trained == "LoRA")
    every.append(replace(lora, batch=3))
    on_cuda = bench.device.type == "cuda"
    if on_cuda and torch.cuda.get_device_properties(bench.device).total_memory < MEMORY_FOR_BATCH_8:
        every[0] = replace(every[0], batch=4)
    return sorted(every, key=lambda case: str(case) not in TARGETS)


def case_row(case: Case, variations: bool, bench: Bench) -> Outcome:
    """Ours beside the plain loop, or beside ours with one technique changed at a time."""
    turns, updates = (1, 1) if bench.tiny else (1, 6)
    deadline = time.monotonic() + bench.seconds_left - PROFILED_SECONDS
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True  # as training scripts do
    main = {"ours", "ours" if variations else PLAIN_LOOP}
    results = measure(
        case, bench.device, turns, updates, deadline,
        wanted=lambda name: name in main or (variations and name != PLAIN_LOOP),
    )  # fmt: skip
    with torch.device("meta"):
        flops = update_flops(case, case.stage(**case.arguments))
    peak, theirs = dense_peak(bench.device), results.get(PLAIN_LOOP)
    lines, failure = [], ""
    for name, result in results.items():
        if isinstance(result, str):
            lines.append({"contender": name, "ms": result})
            failure = failure or (f"ours: {result}" if name == "ours" else "")
            continue
        seconds, memory = result
        gain = theirs[0] / seconds if isinstance(theirs, tuple) else None
        used = flops / seconds / 1e12 / peak if peak else None
        lines.append({
            "contender": name, "ms": f"{seconds * 1000:.0f}", "samples/s": f"{case.batch / seconds:.2f}",
            "beside the plain loop": f"{gain:.2f}x" if gain else "", "TFLOP/s": f"{flops / seconds / 1e12:.3g}",
            "utilisation": f"{used:.0%}" if used else "", "peak GiB": f"{memory / GIB:.2f}",
        })  # fmt: skip
        if name == "ours":
            _MEASURED.append((seconds / flops * 1e12, case))
            target = TARGETS.get(str(case))
            if target and not variations:
                met = "met" if target.met(seconds, memory, gain, used) else "missed"
                lines[-1] |= {"target": f"{target.describe()}: {met}"}
    return Outcome(lines, failure)


def profile_row(bench: Bench) -> Outcome:
    """The case with the most time per useful FLOP: which kernels take it, and how long the GPU has nothing to do."""
    if not _MEASURED:
        raise ValueError("no case was measured before")
    _, case = max(_MEASURED, key=itemgetter(0))
    on_cuda = bench.device.type == "cuda"
    contender = make_ours(case, techniques(bench.device)[0], bench.device)
    for _ in range(3 if on_cuda else 1):
        contender.update()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    if on_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    with profile(activities=activities, acc_events=True) as recorded:
        for _ in range(PROFILED_UPDATES if on_cuda else 1):
            contender.update()
        if on_cuda:
            torch.cuda.synchronize()
    wall = time.perf_counter() - began
    averages = recorded.key_averages()
    key = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    table = averages.table(sort_by=key, row_limit=40)
    (bench.out / "steps_profile.txt").write_text(f"{case}\n\n{table}\n", encoding="utf-8")
    total = sum(getattr(event, key) for event in averages)
    most = sorted(averages, key=lambda event: -getattr(event, key))[:SHOWN_KERNELS]
    shares = "; ".join(f"{event.key[:60]} {getattr(event, key) / total:.0%}" for event in most)
    busy = f", GPU busy {total / 1e6 / wall:.0%} of the time" if on_cuda else ""
    free(bench.device)
    return Outcome([{"contender": f"{case}{busy}: {shares} (steps_profile.txt)"}])


def rows(bench: Bench) -> list[Row]:
    main = [Row(str(case), partial(case_row, case, False)) for case in cases(bench)]
    varied = [
        Row(f"{case}, techniques", partial(case_row, case, True))
        for case in cases(bench)[: 1 if bench.tiny else 4]
        if bench.device.type == "cuda" or case.trained == "full"
    ]
    first = main[:NUM_FIRST]
    return [*first, Row("profile of the slowest", profile_row), *varied, *main[NUM_FIRST:]]


PART = Part(
    name="steps",
    title="Steps: updates at the published sizes",
    about="""
`benchmarks/train_step.py`'s contenders, medians of their updates: ours (compiled blocks, fused AdamW, bfloat16
autocast), diffusers' network in the plain loop of its examples, and in rows called "techniques" ours with one
change. Latents and
conditions are given, as a cache gives them. Utilisation = model FLOPs of an update (`benchmarks/flops.py`: matrix
products, convolutions and attention; backward twice the forward pass, once where weights are frozen; nothing for what
checkpointing computes again) / seconds / the card's dense bfloat16 peak from its data sheet. A missed target is not a
failure of the row. The slowest case is the one with the most seconds per useful FLOP.

Published by others (H100): SimpleTuner's LoKr on Stage C, batch 3, 1024 px, float32: 0.884 s and 51.5 GiB, with
checkpointing 1.179 s and 22.7 GiB. The other families are in the part `families`.
""",
    columns=(
        "contender",
        "ms",
        "samples/s",
        "beside the plain loop",
        "TFLOP/s",
        "utilisation",
        "peak GiB",
        "target",
    ),
    rows=rows,
    row_seconds=500,
)
