"""Say what a training run will need of memory, before anything is loaded, and what to write so that it fits.

python3 tools/memory.py train/train_c.py configs/training/finetune_c_3b.yaml --gpu-memory 24 [key=value ...]

Everything is counted on shapes: no weights, no data and no GPU are needed. `--cached` stands for caches that hold
every feature: then only the encoders that samples need are in memory. CUDA's own part (about 0.5 GiB), workspaces of
kernels, and what `compile: true` and `fp8: true` save are not counted.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from pydantic import ValidationError

from families.common.weights import only_shapes
from tools.arguments import amount, local_path, process_count
from tools.cache_features import as_if_cached
from tools.fitting import Choice, Fitting, Keys, on_command_line
from warpcore.batch_size import split_batch
from warpcore.block_swap import swappable
from warpcore.config import Config, load_config
from warpcore.core import WarpCore
from warpcore.errors import UserError, run_script
from warpcore.launch import planned_processes
from warpcore.networks import Checkpointing
from warpcore.processes import check_divides
from warpcore.rehearsal import Needs, OnShapes, bucket_sizes, load_use_case

GIB = 2**30
USABLE = 0.92
"""Of a GPU's memory: the rest is CUDA's own, kernels' workspaces and gaps between tensors."""
LEVELS = (0, 1, 2, 3)
OF_UPDATES = ("activation_checkpointing", "micro_batch_size", "grad_accum_steps")
"""Keys that change nothing of what is in memory between updates."""
BETWEEN_UPDATES = ("ema_device",)
"""Keys that change nothing of what is in memory only during updates."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=local_path, help="the training script, such as train/train_c.py")
    parser.add_argument("config", help="its config; keys may follow as key=value")
    parser.add_argument("--gpu-memory", type=amount, help="GiB of one GPU: suggest settings that fit")
    parser.add_argument("--processes", type=process_count, help="GPUs of the run; by default the config's key, or 1")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="what it will run on")
    parser.add_argument("--buckets", action="store_true", help="also every bucket, not only the largest")
    parser.add_argument("--cached", action="store_true", help="count as from caches that hold every feature")
    options, keys = parser.parse_known_args()
    use_case = load_use_case(options.script)
    config = load_config(use_case.Config, [options.config, *keys])
    processes = planned_processes(options.processes, config.processes)
    use_case = as_if_cached(use_case, config, options.buckets) if options.cached else use_case
    plan = Plan(use_case, config, options.device, processes)
    with only_shapes():
        plan.show(options.buckets)
        if options.gpu_memory:
            plan.suggest(options.gpu_memory * GIB)


class Plan:
    """What a run needs per process, for its settings and for others."""

    def __init__(self, use_case: type[WarpCore], config: Config, device: str, processes: int = 1):
        self.use_case, self.config, self.device, self.processes = use_case, config, device, processes
        check_divides("sequence_shards", config.processes_per_sample, processes)
        self.micro_batch, self.accumulation = self._split(config)
        self._between: dict[str, Needs] = {}
        self._counted: dict[str, tuple[Needs, Needs]] = {}

    def _split(self, config: Config) -> tuple[int | None, int]:
        return split_batch(config, self.processes // config.processes_per_sample, None)

    def with_keys(self, keys: Keys) -> Config:
        """The config with other keys, about which nothing is logged.

        Raises:
            ValidationError, UserError: they can't be together.
        """
        config = type(self.config).model_validate(self.config.model_dump() | keys) if keys else self.config
        self._split(config)
        return config

    def shapes(self, keys: Keys) -> OnShapes:
        """The run with other keys; raises as `with_keys` does."""
        return OnShapes(self.use_case, self.with_keys(keys), self.device, self.processes)

    def allows(self, keys: Keys) -> bool:
        """Whether the config takes these keys."""
        try:
            self.with_keys(keys)
        except (ValidationError, UserError):
            return False
        return True

    def needs(self, keys: Keys, usable: float = math.inf) -> Needs | None:
        """With other keys, for updates of the largest bucket; None where the run can't have them.

        usable: what takes more bytes even between updates is counted without its activations, which takes less time.
        """
        known, of_updates = _without(keys, OF_UPDATES), _without(keys, BETWEEN_UPDATES)
        between = self._between.get(known)
        if between is None or (between.total <= usable and of_updates not in self._counted):
            try:
                with self.shapes(keys) as shapes:
                    between = self._between[known] = shapes.between_updates()
                    if between.total <= usable and of_updates not in self._counted:
                        level, size = shapes.config.activation_checkpointing, bucket_sizes(shapes.run)[0]
                        self._counted[of_updates] = self.of_bucket(shapes, size, level), between
            except (ValidationError, UserError):  # such as bfloat16 weights of a network with batch norms
                return None
        if between.total > usable:
            return between
        needs, without = self._counted[of_updates]
        return replace(needs, ema=between.ema, on_cpu=needs.on_cpu + between.on_cpu - without.on_cpu)

    def of_bucket(self, shapes: OnShapes, size: tuple[int, ...], level: int) -> Needs:
        """For updates of a bucket, with a level of activation checkpointing."""
        micro, accumulation = self._split(shapes.config)
        shapes.set_checkpointing(level)
        own = shapes.run.config.buckets(shapes.run.bucket_factor).micro_batch_sizes
        return shapes.needs(size, own[size] if micro is None else micro, accumulation)

    @cached_property
    def levels(self) -> Sequence[int]:
        """Of activation checkpointing, those that all trained networks offer."""
        with self.shapes({}) as shapes:
            if shapes.run.block_swaps:
                return (self.config.activation_checkpointing,)
            trained = [shapes.run.networks[name] for name in shapes.run.trainable]
            return LEVELS if all(isinstance(network, Checkpointing) for network in trained) else (0,)

    @cached_property
    def swappable(self) -> int:
        """How many blocks of a frozen base can wait in the CPU's memory."""
        with self.shapes({}) as shapes:
            return sum(len(swappable(shapes.run.networks[name])) for name in shapes.run.swapped_blocks())

    def show(self, buckets: bool) -> None:
        """Print what the config needs, and what it would with other levels of activation checkpointing."""
        own, micro, levels = self.config.activation_checkpointing, self.micro_batch, self.levels
        with self.shapes({}) as shapes:
            sizes = bucket_sizes(shapes.run)
            rows = [(level, sizes[0]) for level in levels] + [(own, size) for size in sizes[1:] if buckets]
            between = shapes.between_updates()
            table = [(level, size, self.of_bucket(shapes, size, level)) for level, size in rows]
            micro = "the bucket's" if micro is None else micro
            print(f"per process of {self.processes}, in GiB; micro-batch {micro}, accumulation {self.accumulation}, "
                  f"{shapes.run.dtype} computation\n".replace("torch.", ""))  # fmt: skip
        for level, _, needs in table[: len(levels)]:
            keys = {} if level == own else {"activation_checkpointing": level}
            self._counted[_without(keys, BETWEEN_UPDATES)] = needs, between
        if self.config.processes_per_sample > 1:
            print("sequence_shards: activations are those of whole clips, of which each process has a part\n")
        needs = table[0][2]
        print("| frozen networks | weights | gradients | optimizer | EMA |\n|---|---|---|---|---|")
        print(f"| {gib(needs.frozen)} | {gib(needs.weights)} | {gib(needs.gradients)} | {gib(needs.optimizer)} "
              f"| {gib(needs.ema)} |\n")  # fmt: skip
        print("| activation_checkpointing | bucket (px) | activations | all | in the CPU's memory |")
        print("|---|---|---|---|---|")
        for level, size, needs in table:
            mark = " (this config)" if (level, size) == (own, sizes[0]) else ""
            print(f"| {level}{mark} | {' x '.join(map(str, size))} | {gib(needs.activations)} | {gib(needs.total)} "
                  f"| {gib(needs.on_cpu)} |")  # fmt: skip

    @cached_property
    def fitting(self) -> Fitting:
        """The search for what fits."""
        return Fitting(self, self.allows)

    def cheapest(self, memory: float) -> tuple[bool, Choice, Needs]:
        """Whether anything fits a GPU of so many bytes; what costs least and does, or else needs least; its needs."""
        usable = USABLE * memory

        def total(keys: Keys) -> float | None:
            needs = self.needs(keys, usable)
            return None if needs is None else needs.total

        fits, choice = self.fitting.cheapest(total, usable)
        return fits, choice, self.needs(self.fitting.keys(choice))

    def suggest(self, memory: float) -> None:
        """Print the keys that cost least and fit a GPU of so many bytes, and what they cost."""
        fits, choice, needs = self.cheapest(memory)
        if not fits:
            print(f"\nnothing fits {memory / GIB:g} GiB in one process, the least being {gib(needs.total)} GiB: shard "
                  "it over several (use_fsdp=true, --processes), or train adapters")  # fmt: skip
            return
        written = on_command_line(self.fitting.keys(choice)) or "this config"
        print(f"\nfits {memory / GIB:g} GiB: {written}\n{gib(needs.total)} GiB of {gib(USABLE * memory)} usable, and "
              f"{gib(needs.on_cpu)} GiB of the CPU's memory")  # fmt: skip
        for keys, cost in self.fitting.costs(choice):
            print(f"- {on_command_line(keys)}: {cost}")


def _without(keys: Keys, left_out: Sequence[str]) -> str:
    """What counts with these keys are known by."""
    return str(sorted((key, value) for key, value in keys.items() if key not in left_out))


def gib(size: float) -> str:
    value = size / GIB
    return "0" if not value else f"{value:.{max(0, 2 - int(math.log10(max(value, 0.01))))}f}"


if __name__ == "__main__":
    run_script(main)
