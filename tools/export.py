"""Write a trained cascade for other programs, and read theirs.

    python3 tools/export.py diffusers runs/quickstart_c exported --run runs/mini_b
    python3 tools/export.py diffusers models/stage_c_bf16.safetensors exported
    python3 tools/export.py from-diffusers exported imported

diffusers: SOURCE is a run's folder or Stage C's weights; further networks are named as in inference/text_to_image.py.
    TARGET gets a folder for StableCascadePriorPipeline and one for StableCascadeDecoderPipeline. diffusers has no
    previewer and no encoder, and for the mini cascade it wants sides that 32 divides.
from-diffusers: SOURCE is such a folder, TARGET gets our files, with the same weights, bit by bit.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from cascade.inference import CascadeSettings
from warpcore.config import load_config
from warpcore.errors import UserError, run_script


class ExportSettings(CascadeSettings):
    """Keys of `diffusers`, beside those of the networks."""

    ddim: bool = False
    """Give networks that predict noise diffusers' DDIM scheduler too, in place of the one published with them."""


def to_diffusers(source: Path, target: Path, arguments: list[str]) -> None:
    from cascade.diffusers_folder import write_folder

    key = "run" if source.is_dir() else "generator_checkpoint_path"
    settings = load_config(ExportSettings, [f"--{key}", str(source), *arguments])
    for name in write_folder(settings, target, settings.ddim):
        print(f"{target / name}")
    if not (target / "decoder").exists():
        print("Only the prior: there are no weights of Stage B (stage_b_checkpoint_path).")


def from_diffusers(source: Path, target: Path, arguments: list[str]) -> None:
    from cascade.diffusers_folder import read_folder

    if arguments:
        raise UserError(f"from-diffusers takes a source and a target, and no {arguments[0]}")
    for file in read_folder(source, target):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


FORMATS: dict[str, Callable[[Path, Path, list[str]], None]] = {
    "diffusers": to_diffusers,
    "from-diffusers": from_diffusers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="key=value or --key value")
    given = parser.parse_args()
    if not given.source.exists():
        raise UserError(f"{given.source} does not exist")
    if given.target.is_dir() and any(given.target.iterdir()):
        raise UserError(f"{given.target} is not empty: name another folder")
    try:
        FORMATS[given.format](given.source, given.target, given.arguments)
    except ModuleNotFoundError as error:
        raise UserError(f"{given.format} needs {error.name}: pip install diffusers transformers") from error


if __name__ == "__main__":
    run_script(main)
