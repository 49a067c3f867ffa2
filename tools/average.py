"""Make an average of a run's weights, of any length, from the snapshots that `post_hoc_ema` wrote.

    python3 tools/average.py runs/my_run my_run_0.08 sigma_rel=0.08
    python3 tools/average.py runs/my_run my_run_early sigma_rel=0.12 update=40000

`sigma_rel` is the standard deviation over time of the shares of an average, relative to the length of the run so far:
0.05 averages over about the last tenth. The new folder is like a run's: `run=`, `tools/export.py` and keys for weights
take it.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from pydantic import PositiveInt
from safetensors import SafetensorError
from torch import Tensor

from families.common.weight_files import RUN_CONFIG
from modules.safetensors_files import open_weights
from tools.arguments import local_path
from warpcore.arguments import read_arguments
from warpcore.average_keys import SigmaRel
from warpcore.config import Settings, make_config
from warpcore.errors import UserError, run_script
from warpcore.exports import INDEX
from warpcore.files import read_bytes, why_no_file, write_whole
from warpcore.outputs import check_new
from warpcore.places import SNAPSHOTS, update_of
from warpcore.post_hoc_ema import Profile, coefficients
from warpcore.safe_json import read_object
from warpcore.weights import write_tensors

LARGEST_ERROR = 0.3
"""Of a profile: where the snapshots are too few for less, another average comes out than was asked for."""


class AverageSettings(Settings):
    """The average."""

    sigma_rel: SigmaRel
    """Its length."""
    update: PositiveInt | None = None
    """The update after which it would have been taken; by default that of the last snapshot."""


def snapshots_of(run: Path) -> dict[Profile, Path]:
    """The folders of a run's snapshots.

    Raises:
        UserError: it has none.
    """
    found = {
        Profile(update_of(folder.parent.name), float(folder.name)): folder
        for folder in sorted((run / SNAPSHOTS).glob("*/*"))
        if update_of(folder.parent.name) and re.fullmatch(r"0\.[0-9]{1,12}", folder.name) and folder.is_dir()
    }
    if not found:
        raise UserError(f"{run / SNAPSHOTS} has no snapshots: train with post_hoc_ema, such as {{every: 5000}}")
    return found


def average(run: Path, target: Path, settings: AverageSettings) -> float:
    """Write the average to a new folder; returns how far its profile is from the wanted one, relative to that.

    Raises:
        UserError: there are too few snapshots, or files of them are missing or damaged, or the folder is there.
    """
    check_new([target], "name another folder")
    if problem := why_no_file(run / RUN_CONFIG):
        raise UserError(f"{run / RUN_CONFIG} {problem}: name the folder of a training run")
    snapshots = snapshots_of(run)
    last = max(profile.update for profile in snapshots)
    wanted = Profile(settings.update or last, settings.sigma_rel)
    if wanted.update > last:
        raise UserError(f"update: {wanted.update} is after the last snapshot, of update {last}: write that, or less")
    shares, error = coefficients(list(snapshots), wanted)
    if error > LARGEST_ERROR:
        raise UserError(
            f"sigma_rel: {wanted.sigma_rel} at update {wanted.update} is too far from all sums of the "
            f"{len(snapshots)} snapshots (by {error:.0%}): choose one nearer to theirs, or update: {last}"
        )
    folders = list(snapshots.values())
    names = {path.name for path in folders[-1].glob("*.safetensors")}
    for folder in folders:
        if {path.name for path in folder.glob("*.safetensors")} != names:
            raise UserError(f"{folder} lacks weights that {folders[-1]} has: start the run again to complete it")
    about = {"update": str(wanted.update), "sigma_rel": f"{wanted.sigma_rel:g}"}
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".average_") as unfinished:
        made = Path(unfinished, target.name)
        made.mkdir()
        write_whole(made / RUN_CONFIG, read_bytes(run / RUN_CONFIG))
        for name in sorted(names):
            _write(made / name, [folder / name for folder in folders], shares, about)
        for path in folders[-1].glob(f"*{INDEX}"):
            index = read_object(path, f"{path}, an index,")
            index["metadata"] = index.get("metadata", {}) | about
            write_whole(made / path.name, json.dumps(index, indent=1) + "\n")
        os.replace(made, target)
    return error


def _write(target: Path, files: Sequence[Path], shares: np.ndarray, about: Mapping[str, str]) -> None:
    """A file of sums; memory holds a few tensors at a time."""
    opened = {}
    for file in files:
        try:
            opened[file] = open_weights(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} can't be read: {error}") from None
    last = opened[files[-1]]
    shapes = {}
    for name in list(last.keys()):
        shape = last.get_slice(name).get_shape()
        shapes[name] = torch.empty(shape, dtype=last.get_tensor(name).dtype, device="meta")
    write_tensors(target, shapes, (last.metadata() or {}) | about, values=partial(_summed, opened, shares.tolist()))


def _summed(files: Mapping[Path, Any], shares: Sequence[float], name: str) -> Tensor:
    """The sum of a tensor of all snapshots; one that never changed, or counts something, as it is."""
    *_, newest = files.values()
    last = newest.get_tensor(name)
    total, is_constant = torch.zeros(last.shape, dtype=torch.float64), True
    for (path, file), share in zip(files.items(), shares, strict=True):
        try:
            tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{path} is of another network than later snapshots: {error}") from None
        if tensor.shape != last.shape:
            raise UserError(f"{path} is of another network than later snapshots: {name} is {tuple(tensor.shape)}")
        is_constant = is_constant and torch.equal(tensor, last)
        total += tensor.double() * share
    return last if is_constant or not last.is_floating_point() else total.to(last.dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=local_path, help="the folder of a training run")
    parser.add_argument("target", type=local_path, help="a folder that is not there yet")
    parser.add_argument("keys", nargs=argparse.REMAINDER, help="sigma_rel=0.08 update=40000")
    # Keys may stand between the paths, whose names may have an equals sign, too.
    keys = AverageSettings.model_fields
    given = parser.parse_args(sorted(sys.argv[1:], key=lambda argument: argument.partition("=")[0] in keys))
    values: dict = {}
    read_arguments(AverageSettings, given.keys, values)
    error = average(given.run, given.target, make_config(AverageSettings, values))
    print(
        f"{given.target}: its profile is that of sigma_rel to {error:.2%}. It is taken like a run: run={given.target} "
        "draws with it, and tools/export.py exports it"
    )


if __name__ == "__main__":
    run_script(main)
