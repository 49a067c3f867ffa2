"""Keys that inference scripts of all families share, and what they take of training runs."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from families.common.weight_files import RUN_CONFIG, is_run, weights_of_run
from warpcore.config import Settings
from warpcore.config_files import read_mapping
from warpcore.config_keys import MicroBatchSize


class RunSettings(Settings):
    """Networks out of training runs."""

    run: list[Path] = []
    """Folder of a training run, or several: the weights that they trained and their model settings are used."""
    use_ema: bool = True
    """With `run`: take the averaged weights, where there are some."""


def runs_of(values: Mapping[str, Any]) -> tuple[list, list[Path]]:
    """What the key `run` lists, before its type is checked, and the folders among that."""
    given = values.get("run") or []
    listed = given if isinstance(given, list) else [given]
    return listed, [Path(one) for one in listed if isinstance(one, str | Path)]


def read_run(folder: Path, names: Collection[str], use_ema: bool = True) -> tuple[dict[str, Any], dict[str, Path]]:
    """The saved keys of a training run, and the files of those weights `names` that it has exported.

    Raises:
        ValueError: not a run's folder, or it holds no weights yet.
    """
    if not is_run(folder):
        raise ValueError(f"run: {folder} is no training run: it holds no {RUN_CONFIG}")
    saved = read_mapping(folder / RUN_CONFIG)
    exported = {name: file for name in names if (file := weights_of_run(folder, name, use_ema))}
    if not exported:
        raise ValueError(
            f"run: {folder} holds no weights yet (such as generator.safetensors): wait for its first save"
        )
    return saved, exported


class ComputeSettings(Settings):
    """Where and how networks compute."""

    batch_size: MicroBatchSize = 8
    """Pictures that go through a network at once."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """Where to compute."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision; by default bfloat16 on CUDA, else float32."""
