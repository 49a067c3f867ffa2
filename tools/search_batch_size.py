"""Find the micro-batch that a training script runs best with, bucket by bucket, and write it to a copy of its config.

python3 tools/search_batch_size.py train/train_c.py configs/training/finetune_c_1b.yaml tuned.yaml
python3 tools/search_batch_size.py SCRIPT CONFIG TUNED --max-memory 20 --step-seconds 1.5 [key=value ...]

The largest micro-batch that fits in memory (and whose pass takes no longer than `--step-seconds`) is searched between
halves around a guess; of those tried, `--best speed` takes the one with most samples per second. The networks are
built as in training, and updates made with black pictures at learning rate 0. One micro-batch size serves all buckets:
the least of them is written.
"""

import warpcore.openmp
import argparse
import re

from tools.arguments import amount, local_path, positive, process_count
from warpcore.batch_size import fitting_sizes
from warpcore.config import ConfigError, load_config
from warpcore.config_files import bases_from
from warpcore.errors import UserError, run_script
from warpcore.launch import planned_processes
from warpcore.outputs import check_new
from warpcore.rehearsal import Rehearsal, bucket_sizes, load_use_case
from warpcore.safe_yaml import parse_mapping
from warpcore.text import read_text

GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("script", type=local_path, help="the training script, such as train/train_c.py")
    parser.add_argument("config", type=local_path, help="its config; keys may follow as key=value")
    parser.add_argument("tuned", type=local_path, help="the config to write")
    parser.add_argument("--max-memory", type=amount, help="GiB to stay under; needed on a CPU, else all of the GPU")
    parser.add_argument("--step-seconds", type=amount, help="a micro-batch takes no longer than this")
    parser.add_argument("--best", choices=("size", "speed"), default="size", help="which of those that fit")
    parser.add_argument("--guess", type=positive, help="where to begin; by default the config's micro-batch")
    parser.add_argument("--processes", type=process_count, help="GPUs of the run; by default the config's key, or 1")
    options, keys = parser.parse_known_args()
    check_new([options.tuned], "give the name of a new file")
    use_case = load_use_case(options.script)
    config = load_config(use_case.Config, [str(options.config), *keys])
    processes = planned_processes(options.processes, config.processes)
    fitting = fitting_sizes(config.batch_size, processes)
    if not fitting:
        raise UserError(f"batch_size {config.batch_size} does not divide by {processes} processes")
    guess = options.guess or config.micro_batch_size or fitting[-1] // (config.grad_accum_steps or 1)
    limit = None if options.max_memory is None else options.max_memory * GIB
    with Rehearsal(use_case, config, limit) as rehearsal:
        chosen = {}
        print("| bucket (H x W px) | micro-batch | seconds | samples/s | peak GiB |\n|---|---|---|---|---|")
        for size in bucket_sizes(rehearsal.run):
            chosen[size] = search(rehearsal, size, fitting, guess, options.step_seconds, options.best)
            guess = chosen[size]
    least = min(chosen.values())
    print("\n" + ", ".join(f"{h} x {w}: {n}" for (h, w), n in chosen.items()) + f"; micro_batch_size: {least}")
    inherited = [f"base={bases}"] if (bases := bases_from(options.config, options.tuned.parent)) else []
    if bases and config.grad_accum_steps is not None:
        inherited.append("grad_accum_steps=null")  # it follows from the two sizes
    text = with_micro_batch(read_text(options.config), least, [*inherited, *keys])
    options.tuned.parent.mkdir(parents=True, exist_ok=True)
    options.tuned.write_text(text, encoding="utf-8")
    load_config(use_case.Config, [str(options.tuned)])
    print(f"written to {options.tuned}")


def search(
    rehearsal: Rehearsal, size: tuple[int, int], fitting: list[int], guess: int, seconds: float | None, best: str
) -> int:
    """The largest of the sizes `fitting` (for `best` "speed", the fastest tried) that a bucket can be trained with.

    Raises:
        UserError: not even the least can.
    """
    speeds: dict[int, float] = {}

    def fits(count: int) -> bool:
        measured = rehearsal.measure(size, count)
        if measured is None:
            print(f"| {size[0]} x {size[1]} | {count} | too much memory | | |", flush=True)
            return False
        took, peak = measured
        speeds[count] = count / took
        print(f"| {size[0]} x {size[1]} | {count} | {took:.3f} | {count / took:.1f} | {peak / GIB:.2f} |", flush=True)
        if seconds is not None and took > seconds:
            del speeds[count]
            return False
        return True

    low, high = -1, len(fitting)  # the largest known to fit, the least known not to
    place = max(i for i, n in enumerate(fitting) if n <= max(guess, fitting[0]))
    while high - low > 1:
        if fits(fitting[place]):
            low = place
            place = min(place + 1, high - 1) if high == len(fitting) else (low + high) // 2
        else:
            high = place
            place = (low + high) // 2
        place = max(place, low + 1)
    if low < 0:
        raise UserError(
            f"a bucket of {size[0]} x {size[1]} px cannot even be trained with {fitting[0]} sample(s) within these "
            "limits: raise activation_checkpointing, or see tools/memory.py"
        )
    return max(speeds, key=speeds.get) if best == "speed" else fitting[low]


def with_micro_batch(text: str, micro_batch: int, keys: list[str]) -> str:
    """A config's text, comments and all, with the micro-batch, and with the keys given beside it."""
    changes = {"micro_batch_size": str(micro_batch)}
    for key in keys:
        name, equals, value = key.removeprefix("--").partition("=")
        if not equals or "." in name:
            raise ConfigError(f"argument {key!r}: write key=value for a key of the config itself")
        changes[name] = value
    present = parse_mapping(text, "the config")
    text = re.sub(r"(?m)^grad_accum_steps:.*\n?", "", text)  # it follows from the two sizes
    for name, value in changes.items():
        if name in present:
            text = re.sub(rf"(?m)^{re.escape(name)}:.*(\n[ \t-]+.*)*$", lambda _, n=name, v=value: f"{n}: {v}", text)
        else:
            text = f"{text.rstrip()}\n{name}: {value}\n"
    return text


if __name__ == "__main__":
    run_script(main)
