"""Part `smoke` of `benchmarks/gpu.py`: every training script makes two updates in every mode."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import yaml

from benchmarks.gpu_part import Bench, NotHere, Outcome, Part, Row
from benchmarks.gpu_scripts import (
    SCRIPTS,
    fresh,
    make_cache,
    metrics,
    mini_generator,
    script_settings,
    train,
    use_case,
)

FLOAT32, BFLOAT16, FEW_BITS = 1e-3, 0.01, 0.05
"""Allowed relative differences of a loss from the CPU's in float32, by what is computed in."""
NOT_OF_THE_LOSS = {"dtype", "weights_dtype", "fp8", "compile", "offload", "activation_checkpointing", "use_fsdp",
                   "fsdp_cpu_offload", "ema_start_iters", "ema_device", "frozen_weights", "swap_blocks"}  # fmt: skip
"""Settings that change how losses are computed, not what they are: the CPU's run goes without them."""
AUTOCAST = {"dtype": "bfloat16"}
LARGEST_DIFFERENCE = 0.02
"""Of drawn pictures from the CPU's, on average, where colours are in [0, 1]."""


_REFERENCES: dict[str, list[dict]] = {}
"""Metrics of the CPU's runs, by script and settings."""


def compared(name: str, changes: dict, tolerance: float, bench: Bench, needs: tuple[str, ...] = ()) -> Outcome:
    """Two updates of a script on the device beside two on the CPU."""
    for package in needs:
        if find_spec(package) is None:
            raise NotHere(f"the package {package} is not installed")
    graphs = changes.get("compile") == "graphs"
    if changes.get("fp8") or graphs:
        bench.needs_cuda("compile: graphs" if graphs else "fp8")
    reference = script_settings(bench, name, "reference", torch.device("cpu"))
    reference |= {key: value for key, value in changes.items() if key not in NOT_OF_THE_LOSS}
    reference["optimizer"] = "adamw" if changes.get("optimizer") == "adamw8bit" else changes.get("optimizer", "adamw")
    key = name + json.dumps(reference, sort_keys=True)
    if key not in _REFERENCES:
        _REFERENCES[key] = train(bench, use_case(name), fresh(reference))
    settings = script_settings(bench, name, "measured", bench.device, **changes)
    # Weights that live in the CPU's memory are updated there, and every update waits for their gradients.
    # Graphs are recorded in the second update.
    lines = train(bench, use_case(name), fresh(settings), watched=not (changes.get("fsdp_cpu_offload") or graphs))
    return losses_beside(lines, _REFERENCES[key], tolerance)


def losses_beside(lines: list[dict], expected: list[dict], tolerance: float) -> Outcome:
    losses, others = [line["loss"] for line in lines], [line["loss"] for line in expected]
    same_samples = [line["samples_hash"] for line in lines] == [line["samples_hash"] for line in expected]
    finite = all(loss is not None and math.isfinite(loss) for loss in losses)
    error = max(abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True)) if finite else math.inf
    failure = "" if finite else "a loss is not finite"
    failure = failure or ("" if same_samples else "other samples were drawn than on the CPU")
    failure = failure or ("" if error <= tolerance else f"losses differ by {error:.2g}, allowed {tolerance:g}")
    cells = {
        "losses": _list(losses),
        "CPU's": _list(others),
        "difference": f"{error:.1e}",
        "allowed": f"{tolerance:g}",
    }
    return Outcome([cells], failure)


def _list(losses: list) -> str:
    return ", ".join("-" if loss is None else f"{loss:.5f}" for loss in losses)


def from_cache(name: str, bench: Bench) -> Outcome:
    """The same losses from a cache as the CPU has from pictures, up to bfloat16."""
    plain = {"clip_image_dropout": 1.0} if "clip_image_dropout" in use_case(name).Config.model_fields else {}
    cached = script_settings(bench, name, "cached", bench.device, **plain)
    cache = make_cache(bench, name, cached)
    return compared(name, {**plain, **AUTOCAST, "webdataset_path": str(cache)}, BFLOAT16, bench)


def stopped_and_resumed(bench: Bench) -> Outcome:
    """A SIGTERM during the second of four updates; the next start makes the others."""
    settings = script_settings(bench, "train_c", "stopped", bench.device, updates=4, ema_start_iters=1)
    kind = use_case("train_c")

    class Stopped(kind):
        def make_update(self, batches):
            super().make_update(batches)
            if self.update == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = train(bench, kind, fresh(settings | {"experiment_id": "whole"}))
    train(bench, Stopped, fresh(settings), status=85)
    stopped_at = metrics(settings)[-1]["update"]
    train(bench, kind, settings)
    outcome = losses_beside(metrics(settings), whole, FLOAT32)
    return outcome if stopped_at == 2 else Outcome(outcome.lines, f"stopped after update {stopped_at} instead of 2")


def validated_and_drawn(name: str, bench: Bench) -> Outcome:
    """Validation loss and sample pictures at a save, with the average of the weights."""
    changes = AUTOCAST | {"validation_samples": 2, "sample_count": 2, "ema_start_iters": 1}
    fields = use_case(name).Config.model_fields
    changes |= {"sample_steps": 2} if "sample_steps" in fields else {}
    changes = {key: value for key, value in changes.items() if key in fields}
    outcome = compared(name, changes, BFLOAT16, bench)
    folder = bench.scratch / "runs" / "measured" / "samples"
    expected = name != "train_towers"
    return outcome if folder.exists() == expected else Outcome(outcome.lines, f"{folder} holds no pictures")


def drawn(bench: Bench) -> Outcome:
    """A picture of the whole cascade (Stage C, B and A), on the device beside the CPU's."""
    from families.cascade.drawing import finish, sketch
    from families.cascade.sampling import Cascade
    from families.cascade.text_to_image import CascadeTextToImageConfig
    from warpcore.config import make_config

    found = {}
    for device in (torch.device("cpu"), bench.device):
        config = make_config(CascadeTextToImageConfig, {
            "model_version": "mini", "generator_checkpoint_path": str(mini_generator(bench)), "prompts": ["a circle"],
            "image_size": 64, "steps": 2, "stage_b_steps": 2, "device": device.type, "dtype": "float32",
        })  # fmt: skip
        cascade = Cascade(config)
        with torch.no_grad():
            drawing = sketch(cascade, ["a circle"], [0], config.size_px, negative_prompt="", **config.sampling)
            found[len(found)] = finish(cascade, drawing)[0]
    error = (found[0] - found[1]).abs().mean().item()
    failure = "" if error <= LARGEST_DIFFERENCE else f"pictures differ by {error:.3f}"
    return Outcome([{"difference": f"{error:.1e}", "allowed": f"{LARGEST_DIFFERENCE:g}"}], failure)


def shared_by_two(bench: Bench, changes: dict) -> Outcome:
    """Two updates by two processes that share each clip (over NCCL on GPUs), beside one process on the CPU."""
    if bench.device.type == "cuda" and torch.cuda.device_count() < 2:
        raise NotHere("two processes need two GPUs")
    expected = train(bench, use_case("train_stdit"), fresh(script_settings(
        bench, "train_stdit", "reference", torch.device("cpu")
    )))  # fmt: skip
    settings = fresh(script_settings(bench, "train_stdit", "shared", bench.device, sequence_shards=2, **changes))
    config = bench.scratch / "shared.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    script = Path(__file__).parents[1] / "train" / "train_stdit.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, str(script), str(config)], check=True)
    return losses_beside(metrics(settings), expected, FLOAT32)


def rows(bench: Bench) -> list[Row]:
    """All modes; with `tiny` one or two of each kind."""
    found: list[tuple[str, Callable]] = []

    def add(name: str, mode: str, changes: dict, tolerance: float = BFLOAT16, **more) -> None:
        found.append((f"{name}: {mode}", partial(_compared, name=name, changes=changes, tolerance=tolerance, **more)))

    for name in SCRIPTS:
        add(name, "autocast bfloat16", AUTOCAST)
    for name in ("train_c",) if bench.tiny else SCRIPTS:
        add(name, "float32", {}, FLOAT32)
        add(name, "autocast float16", {"dtype": "float16"})
    add("train_c", "bfloat16 weights", AUTOCAST | {"weights_dtype": "bfloat16"})
    add("train_c", "compile", AUTOCAST | {"compile": True})
    graphs = AUTOCAST | {"compile": "graphs", "updates": 4}  # warm up, record, replay twice
    add("train_c", "compile: graphs", graphs)
    for level in (3,) if bench.tiny else (1, 2, 3):
        add("train_c", f"checkpointing {level}", AUTOCAST | {"activation_checkpointing": level})
    for optimizer, needs in (
        ("adafactor", ()), ("muon", ()), ("schedulefree", ("schedulefree",)), ("adamw8bit", ("bitsandbytes",)),
        ("came", ()),
    ):  # fmt: skip
        add("train_c", optimizer, AUTOCAST | {"optimizer": optimizer, "lr": 1e-4}, needs=needs)
    fused = {"fused_backward": True, "clip_grad_norm": None}
    for optimizer in ("adamw", "came"):
        weights = {"weights_dtype": "bfloat16", "optimizer": optimizer, "lr": 1e-4}
        add("train_c", f"fused backward, bfloat16 weights, {optimizer}", AUTOCAST | weights | fused)
    everything = {"offload": ["encoders", "activations"], "activation_checkpointing": 3}
    add("train_c_controlnet", "offload encoders and activations", AUTOCAST | everything)
    swapped = AUTOCAST | {"activation_checkpointing": 3, "swap_blocks": 6}
    for name in ("train_c_lora", "train_c_controlnet"):
        add(name, "block swap", swapped)
    add("train_c_lora", "block swap, int8", swapped | {"frozen_weights": "int8"}, FEW_BITS)
    add("train_c_lora", "nf4", AUTOCAST | {"frozen_weights": "nf4"}, FEW_BITS, needs=("torchao",))
    for dtype in ("float8_e4m3fn", "float8_e5m2", "float8", "int8", "int8_rotated"):
        add("train_c_lora", f"base in {dtype}", AUTOCAST | {"frozen_weights": dtype}, FEW_BITS)
    add("train_cosmos_lora", "base in float8_e4m3fn", AUTOCAST | {"frozen_weights": "float8_e4m3fn"}, FEW_BITS)
    add("train_c", "fp8", AUTOCAST | {"fp8": True}, FEW_BITS, needs=("torchao",))
    sharded = {"use_fsdp": True, "fsdp_cpu_offload": True}
    add("train_c", "FSDP2, one process, weights in the CPU's memory", AUTOCAST | sharded)
    for optimizer, lr in (("came", 1e-4), ("prodigy", 1.0)):
        add("train_c", f"the same with {optimizer}", AUTOCAST | sharded | {"optimizer": optimizer, "lr": lr})
    for name in ("train_c",) if bench.tiny else ("train_c", "train_c_lora", "train_b", "train_sd", "train_cosmos"):
        found.append((f"{name}: from a cache", partial(from_cache, name)))
    two = "train_stdit: sequence_shards: 2, two processes"
    found.append((two, partial(shared_by_two, changes={})))
    if not bench.tiny:
        found.append((f"{two}, FSDP2", partial(shared_by_two, changes={"use_fsdp": True})))
    found.append(("train_c: SIGTERM and resume", stopped_and_resumed))
    found.append(("the whole cascade draws a picture", drawn))
    for name in ("train_c",) if bench.tiny else SCRIPTS:
        found.append((f"{name}: validation and samples", partial(validated_and_drawn, name)))
    if not bench.tiny:
        for name in ("train_c_lora", "train_c_controlnet", "train_b"):
            add(name, "bfloat16 weights", AUTOCAST | {"weights_dtype": "bfloat16"})
        blocks = ("train_c_lora", "train_c_controlnet", "train_b", "train_vae")
        for name in (*blocks, "train_sd", "train_sd_lora", "train_cosmos", "train_cosmos_lora"):
            add(name, "compile", AUTOCAST | {"compile": True})
        add("train_c", "compile, checkpointing 3", AUTOCAST | {"compile": True, "activation_checkpointing": 3})
        add("train_c_lora", "compile, block swap", swapped | {"compile": True})
        add("train_c_lora", "block swap, nf4", swapped | {"frozen_weights": "nf4"}, FEW_BITS, needs=("torchao",))
        add("train_c", "compile, fp8", AUTOCAST | {"compile": True, "fp8": True}, FEW_BITS, needs=("torchao",))
        for name in ("train_c_lora", "train_b"):
            add(name, "compile: graphs", graphs)
        add("train_c", "compile: graphs, two micro-batches", graphs | {"grad_accum_steps": 2})
        add("train_c", "compile: graphs, checkpointing 3", graphs | {"activation_checkpointing": 3})
        for name in ("train_b", "train_sd", "train_cosmos"):
            add(name, "checkpointing 3", AUTOCAST | {"activation_checkpointing": 3})
            add(name, "offload encoders and activations", AUTOCAST | everything)
        for name in ("train_b", "train_cosmos"):
            add(name, "FSDP2, one process, weights in the CPU's memory", AUTOCAST | sharded)
        add("train_c", "EMA in the CPU's memory", AUTOCAST | {"ema_start_iters": 0, "ema_device": "cpu"})
    return [Row(name, measure) for name, measure in found]


def _compared(bench: Bench, *, name: str, changes: dict, tolerance: float, needs: tuple[str, ...] = ()) -> Outcome:
    return compared(name, changes, tolerance, bench, needs)


PART = Part(
    name="smoke",
    title="Smoke: every training script, two updates in every mode",
    about=f"""
Mini networks, batches of 4 photographs of 64 px. Checked: losses are finite; the samples are those of the CPU; the
two losses are those of the same updates on the CPU in float32, within a relative difference of {FLOAT32:g} (float32,
TF32 off), {BFLOAT16:g} (16 bits) or {FEW_BITS:g} (fp8, float8, int8, nf4). From the second update on, waiting for the
GPU inside an update is an error (`torch.cuda.set_sync_debug_mode("error")`), except with weights in the CPU's memory.
FSDP2 runs in a process group of one (NCCL on a GPU). Two processes that share each clip need two GPUs; with one, their
rows say so.
""",
    columns=("losses", "CPU's", "difference", "allowed"),
    rows=rows,
)
