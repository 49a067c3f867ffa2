"""Say what a training run will need of memory, before anything is loaded, and what to write so that it fits.

python3 tools/memory.py train/train_c.py configs/training/finetune_c_3b.yaml --gpu-memory 24 [key=value ...]

Everything is counted on shapes: no weights, no data and no GPU are needed. `--cached` stands for caches that hold
every feature: then only the encoders that samples need are in memory. CUDA's own part (about 0.5 GiB), workspaces of
kernels, and what `compile: true` and `fp8: true` save are not counted.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property

import yaml

from families.common.weights import only_shapes
from tools.arguments import amount, local_path, process_count
from tools.cache_features import as_if_cached
from warpcore import optim
from warpcore.batch_size import divisors, split_batch
from warpcore.config import Config, load_config, make_config
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
        self.micro_batch, self.accumulation = split_batch(config, processes // config.processes_per_sample, None)

    def shapes(self, changes: dict) -> OnShapes:
        """The run with other settings.

        Raises:
            ConfigError: it can't have them.
        """
        config = make_config(type(self.config), self.config.model_dump() | changes)
        return OnShapes(self.use_case, config, self.device, self.processes)

    def needs(
        self, shapes: OnShapes, level: int, micro_batch: int | None, size: tuple[int, ...] | None = None
    ) -> Needs:
        """Of a level of activation checkpointing and a micro-batch, by default the bucket's; of the largest bucket."""
        shapes.set_checkpointing(level)
        size = size or bucket_sizes(shapes.run)[0]
        if micro_batch is None:
            own = shapes.run.config.buckets(shapes.run.bucket_factor).micro_batch_sizes
            return shapes.needs(size, own[size], self.accumulation)
        return shapes.needs(size, micro_batch, self.accumulation * self.micro_batch // micro_batch)

    @cached_property
    def levels(self) -> Sequence[int]:
        """Of activation checkpointing, those that all trained networks offer."""
        with self.shapes({}) as shapes:
            trained = [shapes.run.networks[name] for name in shapes.run.trainable]
            return LEVELS if all(isinstance(network, Checkpointing) for network in trained) else (0,)

    def show(self, buckets: bool) -> None:
        """Print what the config needs, and what it would with other levels of activation checkpointing."""
        own, micro, levels = self.config.activation_checkpointing, self.micro_batch, self.levels
        with self.shapes({}) as shapes:
            sizes = bucket_sizes(shapes.run)
            rows = [(level, sizes[0]) for level in levels] + [(own, size) for size in sizes[1:] if buckets]
            table = [(level, size, self.needs(shapes, level, micro, size)) for level, size in rows]
            micro = "the bucket's" if micro is None else micro
            print(f"per process of {self.processes}, in GiB; micro-batch {micro}, accumulation {self.accumulation}, "
                  f"{shapes.run.dtype} computation\n".replace("torch.", ""))  # fmt: skip
        if self.config.processes_per_sample > 1:
            print("sequence_shards: activations are those of whole clips, of which each process has a part\n")
        needs = table[0][2]
        print("| frozen networks | weights | gradients | optimizer | EMA |\n|---|---|---|---|---|")
        print(f"| {_gib(needs.frozen)} | {_gib(needs.weights)} | {_gib(needs.gradients)} | {_gib(needs.optimizer)} "
              f"| {_gib(needs.ema)} |\n")  # fmt: skip
        print("| activation_checkpointing | bucket (px) | activations | all | in the CPU's memory |")
        print("|---|---|---|---|---|")
        for level, size, needs in table:
            mark = " (this config)" if (level, size) == (own, sizes[0]) else ""
            print(f"| {level}{mark} | {' x '.join(map(str, size))} | {_gib(needs.activations)} | {_gib(needs.total)} "
                  f"| {_gib(needs.on_cpu)} |")  # fmt: skip

    def suggest(self, memory: float) -> None:
        """Print the first settings that fit, by what they cost: nothing, time, precision."""
        least = math.inf
        for changes, needs in self._alternatives(USABLE * memory):
            if needs.total <= USABLE * memory:
                keys = yaml.safe_dump(changes, default_flow_style=True, sort_keys=False, width=math.inf)
                written = keys.strip()[1:-1] or "this config"
                print(f"\nfits {memory / GIB:g} GiB: {written} ({_gib(needs.total)} GiB of {_gib(USABLE * memory)} "
                      f"usable, {_gib(needs.on_cpu)} GiB of the CPU's memory)")  # fmt: skip
                return
            least = min(least, needs.total)
        print(
            f"\nnothing fits {memory / GIB:g} GiB in one process, the least being {_gib(least)} GiB: shard it over "
            "several (use_fsdp: true, --processes), or train adapters (train/train_c_lora.py)"
        )

    def _alternatives(self, usable: float) -> Iterator[tuple[dict, Needs]]:
        """Settings and what they need, the first ones being those that cost least."""
        own = self.config.activation_checkpointing
        as_written = [(own, self.micro_batch)]
        sizes = reversed(divisors(self.micro_batch)) if self.micro_batch else [None]
        smaller = [(level, n) for n in sizes for level in self.levels if level >= own]
        free, dear = self._places()
        for changes, batches in [*((c, as_written) for c in free), *((c, smaller) for c in (*free, *dear))]:
            if "activations" in changes.get("offload", ()) and not own:
                batches = [(level, n) for level, n in batches if level]
            with ExitStack() as using:
                try:
                    level = batches[-1][0] if batches else 0
                    shapes = using.enter_context(self.shapes(changes | {"activation_checkpointing": level}))
                except UserError:  # such as bfloat16 weights with another optimizer than AdamW
                    continue
                least = shapes.between_updates()
                if least.total <= usable:
                    least = self.needs(shapes, *batches[-1])
                if least.total > usable:
                    yield changes, least
                    continue
                for level, micro in batches[:-1]:
                    yield changes | self._batch(level, micro), self.needs(shapes, level, micro)
                yield changes | self._batch(*batches[-1]), least

    def _places(self) -> tuple[list[dict], list[dict]]:
        """Keys that move something to where it takes no memory of this GPU: for nearly nothing, and at a price."""
        config = self.config
        averages = config.ema_start_iters is not None or config.post_hoc_ema is not None
        ema = {"ema_device": "cpu"} if averages and not config.fsdp_cpu_offload else {}
        encoders = {"offload": [*dict.fromkeys([*config.offload, "encoders"])]}
        activations = {"offload": [*dict.fromkeys([*config.offload, "encoders", "activations"])]}
        free = [{}, ema, ema | encoders]
        dear = [ema | activations]
        can_shard = optim.supports_dtensor(config.optimizer) and getattr(config, "frozen_weights", None) != "nf4"
        dear += [{"use_fsdp": True}] if self.processes > 1 and can_shard else []
        if can_shard:
            weights = {"use_fsdp": True, "fsdp_cpu_offload": True}
            dear += [weights, weights | encoders, weights | activations]
        dear += [{"weights_dtype": "bfloat16"} | changes for changes in (*free, *dear)]
        free, dear = (
            [{k: v for k, v in one.items() if getattr(config, k) != v} for one in all] for all in (free, dear)
        )
        return [c for i, c in enumerate(free) if c not in free[:i]], [c for c in dear if c not in free]

    def _batch(self, level: int, micro_batch: int) -> dict:
        """The keys of a level of activation checkpointing and a micro-batch, where they differ from the config's."""
        config, changes = self.config, {}
        if level != config.activation_checkpointing:
            changes["activation_checkpointing"] = level
        if micro_batch != self.micro_batch:
            changes["micro_batch_size"] = micro_batch
            if config.grad_accum_steps is not None:
                changes["grad_accum_steps"] = self.accumulation * self.micro_batch // micro_batch
        return changes


def _gib(size: float) -> str:
    value = size / GIB
    return "0" if not value else f"{value:.{max(0, 2 - int(math.log10(max(value, 0.01))))}f}"


if __name__ == "__main__":
    run_script(main)
