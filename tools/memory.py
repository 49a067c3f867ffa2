"""Say what a training run will need of memory, before anything is loaded, and what to write so that it fits.

python3 tools/memory.py train/train_c.py configs/training/finetune_c_3b.yaml --gpu-memory 24 [key=value ...]

Everything is counted on shapes: no weights, no data and no GPU are needed. CUDA's own part (about 0.5 GiB), workspaces
of kernels, and what `compile: true` and `fp8: true` save are not counted.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

from cascade.build import only_shapes
from warpcore.config import Config, load_config
from warpcore.errors import run_script
from warpcore.feed import split_batch
from warpcore.rehearsal import Needs, OnShapes, bucket_sizes, load_use_case

GIB = 2**30
USABLE = 0.92
"""Of a GPU's memory: the rest is CUDA's own, kernels' workspaces and gaps between tensors."""
LEVELS = (0, 1, 2, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=Path, help="the training script, such as train/train_c.py")
    parser.add_argument("config", help="its config; keys may follow as key=value")
    parser.add_argument("--gpu-memory", type=float, help="GiB of one GPU: suggest settings that fit")
    parser.add_argument("--processes", type=int, default=1, help="GPUs of the run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what it will run on")
    parser.add_argument("--buckets", action="store_true", help="also every bucket, not only the largest")
    options, keys = parser.parse_known_args()
    use_case = load_use_case(options.script)
    config = load_config(use_case.Config, [options.config, *keys])
    with only_shapes(), OnShapes(use_case, config, options.device, options.processes) as shapes:
        plan = Plan(shapes, *split_batch(config, options.processes, None))
        plan.show(options.buckets)
        if options.gpu_memory:
            plan.suggest(options.gpu_memory * GIB)


class Plan:
    """What a run needs per process, for its settings and for others."""

    def __init__(self, shapes: OnShapes, micro_batch: int, accumulation: int):
        self.shapes, self.config = shapes, shapes.config
        self.micro_batch, self.accumulation = micro_batch, accumulation
        self.sizes = bucket_sizes(shapes.run)
        self._counted: dict[tuple, Needs] = {}

    def needs(self, level: int, micro_batch: int, size: tuple[int, int] | None = None) -> Needs:
        """Of a level of activation checkpointing and a micro-batch; of the largest bucket without a size."""
        key = (level, micro_batch, size or self.sizes[0])
        if key not in self._counted:
            self.shapes.set_checkpointing(level)
            self._counted[key] = self.shapes.needs(key[2], micro_batch, self.accumulation)
        return self._counted[key]

    def show(self, buckets: bool) -> None:
        own, micro = self.config.activation_checkpointing, self.micro_batch
        needs = self.needs(own, micro)
        print(f"per process, in GiB; micro-batch {micro}, accumulation {self.accumulation}, "
              f"{self.shapes.run.dtype} computation\n".replace("torch.", ""))  # fmt: skip
        print("| frozen networks | weights | gradients | optimizer | EMA |\n|---|---|---|---|---|")
        print(f"| {_gib(needs.frozen)} | {_gib(needs.weights)} | {_gib(needs.gradients)} | {_gib(needs.optimizer)} "
              f"| {_gib(needs.ema)} |\n")  # fmt: skip
        print("| activation_checkpointing | bucket (H x W px) | activations | all |\n|---|---|---|---|")
        rows = [(level, self.sizes[0]) for level in LEVELS] + [(own, size) for size in self.sizes[1:] if buckets]
        for level, size in rows:
            needs = self.needs(level, micro, size)
            mark = " (this config)" if (level, size) == (own, self.sizes[0]) else ""
            print(f"| {level}{mark} | {size[0]} x {size[1]} | {_gib(needs.activations)} | {_gib(needs.total)} |")

    def suggest(self, memory: float) -> None:
        """Print the first settings that fit, by what they cost: nothing, time, precision."""
        for changes, total in self._alternatives():
            if total <= USABLE * memory:
                written = ", ".join(f"{key}: {value}" for key, value in changes.items()) or "this config"
                print(f"\nfits {memory / GIB:g} GiB: {written} ({_gib(total)} GiB of {_gib(USABLE * memory)} usable)")
                return
        print(
            f"\nnothing fits {memory / GIB:g} GiB in one process, the least being {_gib(total)} GiB: shard it over "
            "several (use_fsdp: true, --processes), or train adapters (train/train_c_lora.py)"
        )

    def _alternatives(self) -> Iterator[tuple[dict, float]]:
        own = self.config.activation_checkpointing
        sizes = [n for n in range(self.micro_batch, 0, -1) if self.micro_batch % n == 0]
        for elsewhere in ({}, {"ema_device": "cpu"}, {"ema_device": "cpu", "weights_dtype": "bfloat16"}):
            if not self._changes(elsewhere):
                continue
            for micro in sizes:
                for level in range(own, 4):
                    needs = self.needs(level, micro)
                    total = needs.total - (needs.ema if "ema_device" in elsewhere else 0)
                    if "weights_dtype" in elsewhere:
                        total -= (needs.weights + needs.gradients) / 2
                    changes = {} if level == own else {"activation_checkpointing": level}
                    changes |= {} if micro == self.micro_batch else {"micro_batch_size": micro}
                    yield changes | elsewhere, total

    def _changes(self, keys: dict) -> bool:
        """Whether the config does not say so already, and can."""
        config: Config = self.config
        if "weights_dtype" in keys and (config.weights_dtype == "bfloat16" or config.optimizer != "adamw"):
            return False
        return keys != {"ema_device": "cpu"} or (config.ema_start_iters is not None and config.ema_device == "same")


def _gib(size: float) -> str:
    value = size / GIB
    return "0" if not value else f"{value:.{max(0, 2 - int(math.log10(max(value, 0.01))))}f}"


if __name__ == "__main__":
    run_script(main)
