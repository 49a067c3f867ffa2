"""Find the micro-batch that a training script runs best with, bucket by bucket, and write it to a copy of its config.

python3 tools/search_batch_size.py train/train_c.py configs/training/finetune_c_1b.yaml tuned.yaml
python3 tools/search_batch_size.py SCRIPT CONFIG TUNED --max-memory 20 --step-seconds 1.5 [key=value ...]

The largest micro-batch that fits in memory (and whose pass takes no longer than `--step-seconds`) is searched between
halves around a guess; of those tried, `--best speed` takes the one with most samples per second. The networks are
built as in training, and updates made with black pictures at learning rate 0. One micro-batch size serves all buckets:
the least of them is written.

Of a run of clips whose `bucket_config` has micro-batch sizes for each bucket, those are searched and written:

python3 tools/search_batch_size.py SCRIPT CONFIG TUNED --base 144p:51 [--resolution 240p]

In place of a size, the config may have [guess, range]. The largest size that fits in memory is searched or, with
`--base` or `--base-step-time`, the one that takes about as long as the base bucket's largest, or as many seconds.
"""

import warpcore.openmp
import argparse
import math
import re
from pathlib import Path

import yaml

from tools.arguments import amount, local_path, positive, process_count
from tools.clip_batch_sizes import ClipSearch, with_sizes
from warpcore.batch_size import fitting_sizes
from warpcore.config import Config, ConfigError, load_config
from warpcore.config_files import bases_from
from warpcore.errors import UserError, run_script
from warpcore.files import write_whole
from warpcore.launch import planned_processes
from warpcore.outputs import check_new
from warpcore.processes import check_divides
from warpcore.rehearsal import Rehearsal, bucket_sizes, load_use_case
from warpcore.safe_yaml import parse_mapping
from warpcore.text import read_text
from warpcore.use_case import UseCase

GIB = 2**30
CLIP_OPTIONS = ("resolution", "base", "base-step-time", "range")


def bucket(text: str) -> tuple[str, int]:
    """An argument such as `144p:51`."""
    name, _, frames = text.rpartition(":")
    if not name or not frames.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no bucket: write resolution:frames, such as 144p:51")
    return name, int(frames)


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
    clips = parser.add_argument_group("where buckets have micro-batch sizes of their own (bucket_config)")
    clips.add_argument("--resolution", help="search the buckets of this one alone, such as 240p")
    clips.add_argument("--base", type=bucket, help="the bucket whose time all others shall take, such as 144p:51")
    clips.add_argument(
        "--base-step-time", type=amount, help="the seconds that a micro-batch of all buckets shall take"
    )
    clips.add_argument(
        "--range", type=positive, help="how far from the config's sizes to search; by default half of them"
    )
    options, keys = parser.parse_known_args()
    check_new([options.tuned], "give the name of a new file")
    use_case = load_use_case(options.script)
    config = load_config(use_case.Config, [str(options.config), *keys])
    if config.fused_backward:
        raise UserError(
            "fused_backward: an update is one micro-batch, so that batch_size would have to change: write another, of "
            "which tools/memory.py says whether it fits, or search with fused_backward=false"
        )
    if config.own_micro_batches is not None:
        search_clips(use_case, config, options, keys)
        return
    if given := [name for name in CLIP_OPTIONS if getattr(options, name.replace("-", "_")) is not None]:
        raise UserError(
            f"--{given[0]} is for configs with a bucket_config, which gives each bucket a micro-batch size"
        )
    processes = planned_processes(options.processes, config.processes)
    check_divides("sequence_shards", config.processes_per_sample, processes)
    fitting = fitting_sizes(config.batch_size, processes // config.processes_per_sample)
    if not fitting:
        raise UserError(f"batch_size {config.batch_size} does not divide by {processes} processes")
    guess = options.guess or config.micro_batch_size or fitting[-1] // (config.grad_accum_steps or 1)
    limit = None if options.max_memory is None else options.max_memory * GIB
    with Rehearsal(use_case, config, limit) as rehearsal:
        chosen = {}
        print("| bucket (px) | micro-batch | seconds | samples/s | peak GiB |\n|---|---|---|---|---|")
        for size in bucket_sizes(rehearsal.run):
            chosen[size] = search(rehearsal, size, fitting, guess, options.step_seconds, options.best)
            guess = chosen[size]
    least = min(chosen.values())
    print("\n" + ", ".join(f"{shown(size)}: {n}" for size, n in chosen.items()) + f"; micro_batch_size: {least}")
    inherited = [f"base={bases}"] if (bases := bases_from(options.config, options.tuned.parent)) else []
    if bases and config.grad_accum_steps is not None:
        inherited.append("grad_accum_steps=null")  # it follows from the two sizes
    write_tuned(with_micro_batch(read_text(options.config), least, [*inherited, *keys]), use_case, options.tuned)


def write_tuned(text: str, use_case: type[UseCase], path: Path) -> None:
    """Write a config that training takes as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, text)
    load_config(use_case.Config, [str(path)])
    print(f"written to {path}")


def search_clips(use_case: type[UseCase], config: Config, options: argparse.Namespace, keys: list[str]) -> None:
    """Search the micro-batch size of every bucket of a `bucket_config`, and write it with those that were found.

    Raises:
        UserError: a bucket has none within its range; the message has those that were found.
    """
    entries = config.bucket_config
    plain = config.model_copy(update={"bucket_config": with_sizes(entries, {})})
    timed = options.base is not None or options.base_step_time is not None
    limit = options.max_memory * GIB if options.max_memory else math.inf if timed else None
    if given := [name for name in ("guess", "step_seconds", "processes") if getattr(options, name) is not None]:
        raise UserError(f"--{given[0].replace('_', '-')} is not for bucket_config: write [guess, range] into it")
    with Rehearsal(use_case, plain, limit) as rehearsal:
        found = ClipSearch(rehearsal, entries, options.range)
        found.search(options.resolution, options.base, options.base_step_time)
    tuned = [f"  {name}: {yaml.safe_dump(lengths, default_flow_style=True, width=math.inf).strip()}"
             for name, lengths in with_sizes(entries, found.found).items()]  # fmt: skip
    if found.without:
        raise UserError(
            f"bucket_config: no size will do for {'; '.join(found.without)}: write another guess, or a wider range. "
            "Those found (0 for none):\n" + "\n".join(tuned)
        )
    inherited = [f"base={bases}"] if (bases := bases_from(options.config, options.tuned.parent)) else []
    changes = [key for key in keys if key.removeprefix("--").partition("=")[0] != "bucket_config"]
    text = with_keys(read_text(options.config), [*inherited, *changes], {"bucket_config": "\n" + "\n".join(tuned)})
    write_tuned(text, use_case, options.tuned)


def shown(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def search(
    rehearsal: Rehearsal, size: tuple[int, ...], fitting: list[int], guess: int, seconds: float | None, best: str
) -> int:
    """The largest of the sizes `fitting` (for `best` "speed", the fastest tried) that a bucket can be trained with.

    Raises:
        UserError: not even the least can.
    """
    speeds: dict[int, float] = {}

    def fits(count: int) -> bool:
        measured = rehearsal.measure(size, count)
        if measured is None:
            print(f"| {shown(size)} | {count} | too much memory | | |", flush=True)
            return False
        took, peak = measured
        speeds[count] = count / took
        print(f"| {shown(size)} | {count} | {took:.3f} | {count / took:.1f} | {peak / GIB:.2f} |", flush=True)
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
            f"a bucket of {shown(size)} px cannot even be trained with {fitting[0]} sample(s) within these "
            "limits: raise activation_checkpointing, or see tools/memory.py"
        )
    return max(speeds, key=speeds.get) if best == "speed" else fitting[low]


def with_micro_batch(text: str, micro_batch: int, keys: list[str]) -> str:
    """A config's text, comments and all, with the micro-batch, and with the keys given beside it."""
    text = re.sub(r"(?m)^grad_accum_steps:.*\n?", "", text)  # it follows from the two sizes
    return with_keys(text, keys, {"micro_batch_size": str(micro_batch)})


def with_keys(text: str, keys: list[str], changes: dict[str, str]) -> str:
    """A config's text, comments and all, with values of keys, in YAML, and with `key=value` arguments."""
    for key in keys:
        name, equals, value = key.removeprefix("--").partition("=")
        if not equals or "." in name:
            raise ConfigError(f"argument {key!r}: write key=value for a key of the config itself")
        changes[name] = value
    parse_mapping(text, "the config")  # which says what is wrong with it
    for name, value in changes.items():
        if place := _place_of(name, text):
            start, end = place
            text = f"{text[:start]}{name}: {value}{text[end:]}"
        else:
            text = f"{text.rstrip()}\n{name}: {value}\n"
    return text


def _place_of(key: str, text: str) -> tuple[int, int] | None:
    """Where in a config's text a key begins, and where the line ends in which its value does; None where it isn't."""
    config = yaml.compose(text, Loader=yaml.SafeLoader)
    found = [pair for pair in config.value if pair[0].value == key] if config else []
    if not found:
        return None
    name, value = found[0]
    is_here = value.start_mark.index >= name.end_mark.index  # else it stands where its anchor is
    end = text.find("\n", _end_of(value) if is_here else name.end_mark.index)
    return name.start_mark.index, end if end >= 0 else len(text)


def _end_of(node: yaml.Node) -> int:
    """Where in its text a value ends; the parser takes comments after a block as part of it."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style or not node.value:
        return node.end_mark.index
    last = node.value[-1]
    return _end_of(last[1] if isinstance(last, tuple) else last)


if __name__ == "__main__":
    run_script(main)
