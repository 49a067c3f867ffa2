"""Say what a training run will need of memory, before anything is loaded, and what to write so that it fits.

python3 tools/memory.py train/train_c.py configs/training/finetune_c_3b.yaml --gpu-memory 24 [key=value ...]

Everything is counted on shapes: no weights, no data and no GPU are needed. `--cached` stands for caches that hold
every feature: then only the encoders that samples need are in memory. CUDA's own part (about 0.5 GiB), workspaces of
kernels, and what `compile: true` and `fp8: true` save are not counted.
"""

import argparse

from tools.arguments import amount, local_path, process_count
from tools.cache_features import as_if_cached
from warpcore.config import load_config
from warpcore.errors import run_script
from warpcore.fitting import on_command_line
from warpcore.launch import planned_processes
from warpcore.planning import GIB, USABLE, Plan, counting, gib
from warpcore.rehearsal import load_use_case


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
    show(plan, options.buckets)
    if options.gpu_memory:
        suggest(plan, options.gpu_memory * GIB)


def show(plan: Plan, buckets: bool) -> None:
    """Print what the config needs, and what it would with other levels of activation checkpointing."""
    table = plan.levels_and_buckets(buckets)
    micro = "the bucket's" if plan.micro_batch is None else plan.micro_batch
    print(f"per process of {plan.processes}, in GiB; micro-batch {micro}, accumulation {plan.accumulation}, "
          f"{plan.dtype} computation\n".replace("torch.", ""))  # fmt: skip
    if plan.config.processes_per_sample > 1:
        print("sequence_shards: activations are those of whole clips, of which each process has a part\n")
    own, largest, needs = plan.config.activation_checkpointing, table[0][1], table[0][2]
    print("| frozen networks | weights | gradients | optimizer | EMA |\n|---|---|---|---|---|")
    print(f"| {gib(needs.frozen)} | {gib(needs.weights)} | {gib(needs.gradients)} | {gib(needs.optimizer)} "
          f"| {gib(needs.ema)} |\n")  # fmt: skip
    print("| activation_checkpointing | bucket (px) | activations | all | in the CPU's memory |")
    print("|---|---|---|---|---|")
    for level, size, needs in table:
        mark = " (this config)" if (level, size) == (own, largest) else ""
        print(f"| {level}{mark} | {' x '.join(map(str, size))} | {gib(needs.activations)} | {gib(needs.total)} "
              f"| {gib(needs.on_cpu)} |")  # fmt: skip


def suggest(plan: Plan, memory: float) -> None:
    """Print the keys that cost least and fit a GPU of `memory` bytes, and what they cost."""
    with counting() as counts:
        plan.before_count = counts.update
        fits, choice, needs = plan.cheapest(memory)
    if not fits:
        print(f"\nnothing fits {memory / GIB:g} GiB in one process, the least being {gib(needs.total)} GiB: shard "
              "it over several (use_fsdp=true, --processes), or train adapters")  # fmt: skip
        return
    written = on_command_line(plan.fitting.keys(choice)) or "this config"
    print(f"\nfits {memory / GIB:g} GiB: {written}\n{gib(needs.total)} GiB of {gib(USABLE * memory)} usable, and "
          f"{gib(needs.on_cpu)} GiB of the CPU's memory")  # fmt: skip
    for keys, cost in plan.fitting.costs(choice):
        print(f"- {on_command_line(keys)}: {cost}")


if __name__ == "__main__":
    run_script(main)
