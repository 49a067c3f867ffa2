"""Writes a training config out of that of another program, which a family knows.

    python3 tools/convert_config.py theirs.yaml configs/training/ours.yaml
    python3 tools/convert_config.py theirs.yaml ours.yaml --deepspeed zero2.json webdataset_path=data/shards lr=5e-5

Every key of theirs becomes one of ours, or is named with the reason why none stands for it; these lines are printed,
and stand at the head of OURS. Keys behind OURS are of ours, and win.
"""

import warpcore.openmp
import argparse
import shlex
import textwrap
from pathlib import Path

import yaml

from families.common.converted import ConvertedConfig
from families.registry import converted_config
from tools.arguments import local_path
from warpcore.arguments import read_arguments
from warpcore.config import make_config
from warpcore.config_files import read_mapping
from warpcore.errors import UserError, run_script
from warpcore.files import why_no_file, write_whole
from warpcore.outputs import check_new
from warpcore.rehearsal import load_use_case
from warpcore.safe_json import read_object

TRAIN = Path(__file__).parents[1] / "train"
WIDTH = 118


def convert(theirs: Path, ours: Path, deepspeed: Path | None, keys: list[str], overwrite: bool = False) -> list[str]:
    """Write the config; the lines to print.

    Raises:
        UserError: a file is missing or of no family, a key has a wrong value, or `ours` is there already.
    """
    check_new([ours], "name another file, or give --overwrite", overwrite)
    if deepspeed is not None and (problem := why_no_file(deepspeed)):
        raise UserError(f"--deepspeed: {deepspeed} {problem}")
    launcher = {} if deepspeed is None else read_object(deepspeed, str(deepspeed))
    made = converted_config(theirs, read_mapping(theirs), launcher)
    script = TRAIN / f"{made.script}.py"
    kind = load_use_case(script).Config
    values = {"experiment_id": ours.stem, "checkpoint_path": "runs"} | made.values
    read_arguments(kind, keys, values)
    make_config(kind, dict(values))  # says what is wrong with it
    lines = _head(theirs, ours, made)
    ours.parent.mkdir(parents=True, exist_ok=True)
    comment = "".join(f"# {line}\n" for line in lines)
    write_whole(ours, comment + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=WIDTH))
    return [*lines, f"written: {ours}"]


def _head(theirs: Path, ours: Path, made: ConvertedConfig) -> list[str]:
    commands = [*made.before, "python3 train/" + made.script + ".py {config}"]
    lines = [
        f"Made of {theirs.name}.",
        *(f"  {command}".replace("{config}", shlex.quote(str(ours))) for command in commands),
    ]
    if made.not_taken:
        lines.append("Not taken over:")
    for name, reason in made.not_taken.items():
        lines += textwrap.wrap(f"{name}: {reason}", WIDTH, initial_indent="  ", subsequent_indent="    ")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("theirs", type=local_path, metavar="THEIRS", help="a config of another program, in YAML")
    parser.add_argument("ours", type=local_path, metavar="OURS", help="the config that is written")
    parser.add_argument("--deepspeed", type=local_path, metavar="FILE", help="the JSON that DeepSpeed gets there")
    parser.add_argument("--overwrite", action="store_true", help="replace OURS where it is there already")
    given, keys = parser.parse_known_args()
    for line in convert(given.theirs, given.ours, given.deepspeed, keys, given.overwrite):
        print(line)


if __name__ == "__main__":
    run_script(main)
