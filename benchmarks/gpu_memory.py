"""Part `memory` of `benchmarks/gpu.py`: what tools/memory.py counts beside the measured peaks of updates."""

import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_part import Bench, Outcome, Part, Row
from benchmarks.gpu_scripts import built_on_device, pictures, published_sizes, script_settings, use_case
from benchmarks.plain_loops import FAMILIES, Case, Family
from tools.cache_features import as_if_cached
from tools.search_batch_size import search
from warpcore.config import Config, make_config
from warpcore.core import WarpCore
from warpcore.rehearsal import Needs, OnShapes, Rehearsal, bucket_sizes

GIB, MIB = 2**30, 2**20
TARGET = 0.10
"""The plan may be this much above the peak, and never below it."""
MOST_OFF = 0.30
"""A plan that is further off than this is a fault, not a shortfall."""
FITTING = [1, 2, 4, 8, 16, 32, 64]
"""Micro-batches that are tried for the largest."""
CPU_LIMIT = 8 * GIB

FULL = {"activation_checkpointing": 0}
CHECKPOINTED = {"activation_checkpointing": 3}
CAME = {"weights_dtype": "bfloat16", "optimizer": "came"}
CONFIGS: list[tuple[str, str, str, int, dict]] = [
    ("1B full", "train_c", "1B", 4, FULL),
    ("1B full, checkpointing 3", "train_c", "1B", 4, CHECKPOINTED),
    ("1B full, offload encoders", "train_c", "1B", 4, {"offload": ["encoders"]}),
    ("1B full, offload encoders and activations", "train_c", "1B", 4,
     CHECKPOINTED | {"offload": ["encoders", "activations"]}),
    ("1B full, bfloat16 weights", "train_c", "1B", 4, {"weights_dtype": "bfloat16"}),
    ("1B full, bfloat16 weights, CAME", "train_c", "1B", 4, CAME),
    ("1B full, bfloat16 weights, CAME, fused backward", "train_c", "1B", 4,
     CAME | {"fused_backward": True, "clip_grad_norm": None}),
    ("1B full, Adafactor", "train_c", "1B", 4, {"optimizer": "adafactor"}),
    ("1B full, EMA", "train_c", "1B", 4, {"ema_start_iters": 0}),
    ("1B full, EMA in the CPU's memory", "train_c", "1B", 4, {"ema_start_iters": 0, "ema_device": "cpu"}),
    ("1B LoRA", "train_c_lora", "1B", 4, FULL),
    ("3.6B LoRA", "train_c_lora", "3.6B", 3, FULL),
    ("3.6B LoRA, checkpointing 3", "train_c_lora", "3.6B", 3, CHECKPOINTED),
    ("3.6B LoRA, half of the blocks swapped", "train_c_lora", "3.6B", 3, CHECKPOINTED | {"swap_blocks": 96}),
    ("3.6B LoRA, all blocks swapped", "train_c_lora", "3.6B", 3, CHECKPOINTED | {"swap_blocks": 192}),
    ("1B ControlNet", "train_c_controlnet", "1B", 4, FULL),
    ("3.6B full, checkpointing 3", "train_c", "3.6B", 4, CHECKPOINTED),
]  # fmt: skip
"""(name, script, model version, micro-batch, settings), 1024 px."""
TINY = ("1B full", "1B full, checkpointing 3", "1B full, offload encoders and activations", "1B LoRA")
SEARCHED = ("1B full", "1B full, checkpointing 3", "1B LoRA", "3.6B LoRA, checkpointing 3")


OF_FAMILIES = ("cosmos", "dit", "latte", "pixart")
"""Of `benchmarks/plain_loops.py`: the first case of each."""
LEVELS = range(4)
"""Of NOVA's `activation_checkpointing`, each of which is a part of the network more."""


def prepared(name: str, bench: Bench, batch: int | None = None) -> tuple[type[WarpCore], Config, int]:
    """Use case, configuration and micro-batch of a config in the table; mini and small with `tiny`."""
    _, script, version, micro, changes = next(config for config in CONFIGS if config[0] == name)
    micro = batch or micro
    size = {"model_version": "mini", "image_size": 128} if bench.tiny else {
        "model_version": version, "image_size": 1024, "dtype": None,
        "webdataset_path": str(pictures(bench, 8, 256)),
    }  # fmt: skip
    settings = script_settings(bench, script, "memory", bench.device, batch_size=micro, **size, **changes)
    kind = use_case(script)
    return built_on_device(kind), make_config(kind.Config, settings), micro


def planned(kind: type[WarpCore], config: Config, micro: int, bench: Bench) -> Needs:
    with OnShapes(kind, config, bench.device.type) as shapes:
        return shapes.needs(bucket_sizes(shapes.run)[0], micro)


def from_caches(
    family: Family, case: Case, folder: Path, device: torch.device, **changes: object
) -> tuple[type[WarpCore], Config]:
    """A training of a family beside the Stable Cascade, with caches that hold every feature; its networks are written
    to the folder."""
    kind = family.use_case()
    config = make_config(kind.Config, family.write(case, folder, device) | {
        "experiment_id": "memory", "checkpoint_path": str(folder), "webdataset_path": str(folder), "updates": 1,
        "device": device.type,
    } | case.keys | changes)  # fmt: skip
    return as_if_cached(kind, config), config


def family_row(name: str, changes: dict, bench: Bench) -> Outcome:
    family = FAMILIES[name]
    case = (family.on_cpu if bench.tiny else family.on_gpu)[0]
    with tempfile.TemporaryDirectory(dir=bench.scratch) as folder:
        kind, config = from_caches(family, case, Path(folder), bench.device, **changes)
        return compared(kind, config, case.batch, bench)


def config_row(name: str, bench: Bench) -> Outcome:
    with published_sizes(bench):
        return compared(*prepared(name, bench), bench)


def compared(kind: type[WarpCore], config: Config, micro: int, bench: Bench) -> Outcome:
    """What the planner counts of an update, beside what it takes."""
    needs = planned(kind, config, micro, bench)
    on_cuda = bench.device.type == "cuda"
    with Rehearsal(kind, config, None if on_cuda else CPU_LIMIT) as rehearsal:
        measured = rehearsal.measure(bucket_sizes(rehearsal.run)[0], micro)
    plan = needs.total if on_cuda else needs.total + needs.on_cpu  # a CPU has one memory
    cells = {"micro-batch": str(micro), "planned": _size(plan), "in the CPU's memory": _size(needs.on_cpu)}
    if measured is None:
        return Outcome([cells | {"measured": "out of memory"}], "out of memory")
    seconds, peak = measured
    ratio = plan / peak
    met = "met" if 1 <= ratio <= 1 + TARGET else "missed"
    cells |= {"measured": _size(peak), "planned / measured": f"{ratio:.3f}", "ms": f"{seconds * 1000:.0f}",
              "target": f"1 to {1 + TARGET:.2f}: {met}"}  # fmt: skip
    failure = "" if abs(ratio - 1) <= MOST_OFF else f"the plan is {ratio:.2f} times the peak"
    return Outcome([cells], failure)


def search_row(name: str, bench: Bench) -> Outcome:
    """The largest micro-batch that fits, and what the planner says of it and of twice as many."""
    fitting = FITTING[:3] if bench.tiny else FITTING
    with published_sizes(bench):
        kind, config, _ = prepared(name, bench, fitting[-1])
        with Rehearsal(kind, config, CPU_LIMIT if bench.device.type == "cpu" else None) as rehearsal:
            size = bucket_sizes(rehearsal.run)[0]
            found = search(rehearsal, size, fitting, fitting[0], None, "size")
        totals = [planned(kind, config, micro, bench).total for micro in (found, 2 * found)]
    cells = {"micro-batch": str(found), "planned": f"{_size(totals[0])} (twice as many: {_size(totals[1])})"}
    return Outcome([cells])


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.1f} MiB"


def rows(bench: Bench) -> list[Row]:
    names = [name for name, *_ in CONFIGS if not bench.tiny or name in TINY]
    found = [Row(name, partial(config_row, name)) for name in names]
    found += [
        Row(f"{name} from caches{', checkpointing 3' if changes else ''}", partial(family_row, name, changes))
        for name in (OF_FAMILIES[1:2] if bench.tiny else OF_FAMILIES)
        for changes in (({},) if bench.tiny else ({}, CHECKPOINTED))
    ]  # fmt: skip
    found += [
        Row(f"NOVA from caches, level {level}", partial(family_row, "nova", {"activation_checkpointing": level}))
        for level in LEVELS
    ]
    searched = SEARCHED[:1] if bench.tiny else SEARCHED
    return found + [Row(f"largest micro-batch: {name}", partial(search_row, name)) for name in searched]


PART = Part(
    name="memory",
    title="Memory: the planner beside measured peaks",
    about=f"""
`tools/memory.py`'s count beside the most that PyTorch's allocator gave out during the second of two updates (on a CPU:
what tensors take), 1024 px, random weights; text and image towers have the published widths and one layer, in both.
Target: the plan is within {TARGET:.0%} of the peak and never below it. A row fails if the plan is off by more than
{MOST_OFF:.0%}. What offloading costs is the difference in ms per update. The largest micro-batches are those that
`tools/search_batch_size.py` finds.
""",
    columns=(
        "micro-batch",
        "planned",
        "measured",
        "planned / measured",
        "in the CPU's memory",
        "ms",
        "target",
    ),
    rows=rows,
)
