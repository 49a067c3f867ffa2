"""What DiT and Latte export: the formats of `tools/export.py`."""

from pathlib import Path
from typing import Literal

import torch

from families.common.exports import OTHER_NAME, print_sizes
from families.common.library_files import construct
from families.common.weight_files import GENERATOR, is_run
from families.common.weights import check_names
from families.dit.build import check_network, positions
from families.dit.files import read_dit
from families.dit.inference import DitInferenceSettings, LatteInferenceSettings
from modules.dit import POSITIONS, DiT
from warpcore.config import load_config
from warpcore.errors import UserError
from warpcore.outputs import check_new
from warpcore.pytorch_files import write_pytorch_file
from warpcore.weights import check_range


class ExportSettings(DitInferenceSettings):
    """Keys of `published`, beside those of the networks."""

    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the written weights; float32 is what published files have."""


class LatteExportSettings(LatteInferenceSettings, ExportSettings):
    """Those of Latte's."""

    unused = frozenset({"num_frames", "fps", "autoencoder_frames"})


def latte_to_published(source: Path, target: Path, arguments: list[str]) -> None:
    """A file as Latte's was published: with the weights under `ema`."""
    to_published(source, target, arguments, LatteExportSettings, under="ema")


def to_published(
    source: Path,
    target: Path,
    arguments: list[str],
    kind: type[ExportSettings] = ExportSettings,
    under: str | None = None,
) -> None:
    """A file of the published names. under: the key in it of the weights; by default they are the file's mapping."""
    check_new([target], OTHER_NAME)
    settings = load_config(kind, [f"--{'run' if is_run(source) else GENERATOR}", str(source), *arguments])
    path = settings.generator_checkpoint_path
    if path is None:
        raise UserError(f"{GENERATOR}: there are no weights of the denoiser to write; give them, or a run's folder")
    found = read_dit(path, GENERATOR)
    check_network(found.config, settings)
    with torch.device("meta"):
        network = construct(DiT, found.config, GENERATOR)
    tensors = found.tensors | positions(network)
    check_names(network.state_dict(), tensors, path, GENERATOR)
    tensors = {name: tensors[name] for name in network.state_dict()}
    dtype = getattr(torch, settings.export_dtype)
    check_range(tensors, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_pytorch_file(target, tensors, dtype, unchanged=POSITIONS, under=under)
    print_sizes([target])
