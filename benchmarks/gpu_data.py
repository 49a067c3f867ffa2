"""Part `data` of `benchmarks/gpu.py`: whether data reach the device in time, and how long a checkpoint stops it."""

import os
import shutil
import statistics
import time
from functools import partial

import torch

from benchmarks.gpu_part import Bench, Outcome, Part, Row
from benchmarks.gpu_scripts import (
    built_on_device,
    fresh,
    make_cache,
    pictures,
    published_sizes,
    script_settings,
    train,
    use_case,
)
from warpcore.config import Config

MOST_WAIT = 0.05
"""Share of an update that training may wait for data."""
MOST_PAUSE = 0.02
"""Share that the pauses of checkpoints may take of training, at the default `save_every`."""
SAVE_EVERY = Config.model_fields["save_every"].default
DISK_FOR_FLOAT32 = 80e9
"""Bytes that a checkpoint of the 3.6B with AdamW and its exported weights take in float32."""
COPIES = 20


def quickest(bench: Bench, run: str, **changes) -> dict:
    """The config with the most samples per second: a LoRA on the 1B (`tiny`: the mini) Stage C."""
    if bench.tiny:
        return script_settings(bench, "train_c_lora", run, bench.device, updates=6, **changes)
    size = {
        "model_version": "1B", "image_size": 1024, "batch_size": 16, "dtype": None, "updates": 24, "log_every": 8,
        "allow_tf32": True, "compile": bench.device.type == "cuda",
        "webdataset_path": str(pictures(bench, 64, 1024)),
    }  # fmt: skip
    return script_settings(bench, "train_c_lora", run, bench.device, **size | changes)


def feed_row(cached: bool, workers: int, bench: Bench) -> Outcome:
    """Training with the quickest config, from pictures or from a cache."""
    with published_sizes(bench):
        settings = quickest(bench, "feed", num_workers=workers)
        if cached:
            settings["webdataset_path"] = str(make_cache(bench, "train_c_lora", quickest(bench, "cache")))
        kind = built_on_device(use_case("train_c_lora"))
        lines = train(bench, kind, fresh(settings))
    # In the first third workers start and kernels are compiled.
    settled = lines[len(lines) // 3 :]
    update = statistics.median(settings["batch_size"] / line["samples_per_second"] for line in settled)
    wait = statistics.mean(line["data_wait"] for line in settled)
    met = "met" if wait <= MOST_WAIT * update else "missed"
    cells = {
        "samples/s": f"{settings['batch_size'] / update:.1f}", "ms per update": f"{update * 1000:.1f}",
        "ms waiting": f"{wait * 1000:.1f}", "share": f"{wait / update:.1%}", "target": f"<= {MOST_WAIT:.0%}: {met}",
    }  # fmt: skip
    return Outcome([cells])


def copies_row(bench: Bench) -> Outcome:
    """A batch of pictures to the GPU, from pinned and from other memory; a pinned one may not hold Python up."""
    bench.needs_cuda("a copy from pinned memory")
    batch = torch.zeros(16, 3, 1024, 1024, dtype=torch.uint8)
    lines, failure = [], ""
    for name, source in (("pinned", batch.pin_memory()), ("not pinned", batch)):
        target = torch.empty_like(batch, device=bench.device)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(COPIES):
            target.copy_(source, non_blocking=True)
        issued = time.perf_counter() - began
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        if name == "pinned" and issued > seconds / 2:
            failure = "copies from pinned memory hold Python up"
        lines.append({"what": name, "ms per update": f"{seconds / COPIES * 1000:.1f}",
                      "samples/s": f"{len(batch) * COPIES / seconds:.0f}"})  # fmt: skip
    return Outcome(lines, failure)


def pause_row(bench: Bench) -> Outcome:
    """What the training loop waits for at a save: Stage C 3.6B (`tiny`: the mini), AdamW, all weights trained."""
    changes = {"updates": 4, "save_every": 2, "keep_last": 1}
    what = "mini, float32"
    if not bench.tiny:
        in_float32 = shutil.disk_usage(bench.scratch).free > DISK_FOR_FLOAT32
        what = f"3.6B, {'float32' if in_float32 else 'bfloat16'} weights"
        changes |= {
            "model_version": "3.6B", "image_size": 512, "dtype": None, "activation_checkpointing": 3,
            "weights_dtype": "float32" if in_float32 else "bfloat16", "batch_size": 4,
        }  # fmt: skip
    pauses: list[float] = []
    updates: list[float] = []

    class Timed(built_on_device(use_case("train_c"))):
        def make_update(self, batches):
            began = time.perf_counter()
            super().make_update(batches)
            self._finish()
            updates.append(time.perf_counter() - began)

        def _save(self):
            self.checkpoints.wait()
            self._finish()
            began = time.perf_counter()
            super()._save()
            self._finish()
            pauses.append(time.perf_counter() - began)

        def _finish(self):
            if self.device.type == "cuda":
                torch.cuda.synchronize()

    with published_sizes(bench):
        settings = fresh(script_settings(bench, "train_c", "pause", bench.device, **changes))
        train(bench, Timed, settings, watched=False)
    folder = bench.scratch / "runs" / "pause"
    size = sum(path.stat().st_size for path in folder.glob("state/*/*"))
    shutil.rmtree(folder)
    pause, update = pauses[-1], min(updates)
    share = pause / (pause + update * SAVE_EVERY)
    met = "met" if share <= MOST_PAUSE else "missed"
    cells = {"what": f"{what}, {size / 1e9:.2f} GB, pause {pause:.2f} s", "ms per update": f"{update * 1000:.1f}",
             "share": f"{share:.2%} of {SAVE_EVERY} updates", "target": f"<= {MOST_PAUSE:.0%}: {met}"}  # fmt: skip
    return Outcome([cells], "" if len(pauses) == 2 else f"{len(pauses)} saves instead of 2")


def rows(bench: Bench) -> list[Row]:
    counts = (1,) if bench.tiny else (4, max(4, (os.cpu_count() or 4) - 1))
    found = [
        Row(f"from {'a cache' if cached else 'pictures'}, {count} workers", partial(feed_row, cached, count))
        for count in dict.fromkeys(counts)
        for cached in (True, False)
    ]
    return [*found, Row("pause of a checkpoint", pause_row), Row("copies of 16 pictures of 1024 px", copies_row)]


PART = Part(
    name="data",
    title="Data: does the loader feed the device",
    about=f"""
The config with the most samples per second (LoRA on the 1B, batch 16, 1024 px, random weights, towers of one layer)
trains from photographs of 1 to 1.5 megapixels and from a cache of float32 features. Target: updates wait for data for
at most {MOST_WAIT:.0%} of their time. A checkpoint's pause is what the training loop waits for: at most
{MOST_PAUSE:.0%} of the time between two saves (`save_every` {SAVE_EVERY}).
""",
    columns=("what", "samples/s", "ms per update", "ms waiting", "share", "target"),
    rows=rows,
)
