"""Write what was trained for other programs, and read what they wrote.

    python3 tools/export.py diffusers runs/quickstart_c exported
    python3 tools/export.py lora-comfyui runs/dog dog_comfyui.safetensors
    python3 tools/export.py lora dog_comfyui.safetensors dog.safetensors --model_version 1B

    FORMAT                SOURCE                                  TARGET
    diffusers             a run, or weights of Stage C            a folder for StableCascadePriorPipeline, and one for
                                                                  StableCascadeDecoderPipeline
    from-diffusers        such a folder                           a folder of our files, with the same weights
    lora                  a LoRA: a run, a file, peft's folder    our file, which says rank, alpha and tokens
    lora-comfyui          the same                                a file for ComfyUI; tokens as embeddings beside it
    lora-kohya            the same                                a file for kohya's scripts; tokens the same way
    lora-onetrainer       the same                                a file for OneTrainer, with the tokens
    lora-peft             the same                                a folder for peft, on diffusers' StableCascadeUNet
    lora-reference        the same                                a numbered file of the reference implementation
    lora-merged           the same                                weights of Stage C that hold it; tokens as embeddings
    controlnet            a ControlNet: a run or a file           our file, which says filter and blocks
    controlnet-reference  the same                                a file that the reference implementation loads

Nothing that exists is overwritten. Tensors keep every bit, but in lora-merged, and in lora-reference where alpha is no
power of two. Tokens beside TARGET.safetensors are in TARGET_embeddings, a file each.

Keys follow as in the scripts, key=value or --key value; --help behind a format, a source and a target lists them. With
them, diffusers takes further networks, every LoRA its model_version, and files that do not say it what they need: lora
the module_filters and train_tokens of the training, controlnet the controlnet_filter and controlnet_blocks. diffusers
has no previewer and no encoder, and for the mini cascade it wants sides that 32 divides.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from families.cascade import build, lora
from families.cascade.controlnet import comfyui_notes, file_metadata, published_layout, settings_of_file
from families.cascade.inference import TARGET_KEY, CascadeSettings
from families.cascade.lora_files import Files, lora_files, read_lora, shortcomings, token_files, write_files
from families.cascade.lora_formats import Lora
from families.common.weight_files import metadata_of, weights_in
from families.common.weights import read_weights
from modules.tokenizers import BytePairTokenizer, Tokenizer
from tools.arguments import local_path
from warpcore.config import FileName, Settings, load_config
from warpcore.errors import UserError, run_script
from warpcore.outputs import check_new

OTHER_NAME = "name another file"
"""What to do where a file is there already."""

# ------------------------------------------------------------------ diffusers


class ExportSettings(CascadeSettings):
    """Keys of `diffusers`, beside those of the networks."""

    ddim: bool = False
    """Give networks that predict noise diffusers' DDIM scheduler too, in place of the one published with them."""


def to_diffusers(source: Path, target: Path, arguments: list[str]) -> None:
    from families.cascade.diffusers_folder import write_folder

    key = "run" if source.is_dir() else "generator_checkpoint_path"
    settings = load_config(ExportSettings, [f"--{key}", str(source), *arguments])
    for name in write_folder(settings, target, settings.ddim):
        print(f"{target / name}")
    if not (target / "decoder").exists():
        print("Only the prior: there are no weights of Stage B (stage_b_checkpoint_path).")


def from_diffusers(source: Path, target: Path, arguments: list[str]) -> None:
    from families.cascade.diffusers_folder import read_folder

    if arguments:
        raise UserError(f"from-diffusers takes a source and a target, and no {arguments[0]}")
    _print_sizes(read_folder(source, target))


# ------------------------------------------------------------------ LoRA


class LoraExportSettings(CascadeSettings):
    """Keys of the LoRA formats, beside those of the networks."""

    lora: list[FileName] = []
    """The LoRA: this is SOURCE."""
    strength: float = 1.0
    """How much of it `lora-merged` adds to the weights."""
    module_filters: list[str] = [".attn"]
    """The `module_filters` of the training of a reference's file, which does not say it."""
    train_tokens: list[tuple[str, str | None]] | None = None
    """The `train_tokens` of the training of a reference's file, where it had some."""


def open_lora(source: Path, arguments: list[str]) -> tuple[LoraExportSettings, Lora]:
    key = "run" if (source / "config.yaml").is_file() else "lora"
    said = metadata_of(source).get("model_version")
    model_version = ["--model_version", said] if said else []
    weights_in(source, "lora")  # says what is wrong with a run that has none
    settings = load_config(LoraExportSettings, [f"--{key}", str(source), *model_version, *arguments])
    if len(settings.lora) != 1:
        raise UserError(f"one LoRA at a time, not {len(settings.lora)}: {', '.join(settings.lora) or source}")
    rows = lora.train_tokens(build.text(settings), settings.train_tokens) if settings.train_tokens else None
    return settings, read_lora(Path(settings.lora[0]), lora.outline(settings), settings.module_filters, rows)


def export_lora(kind: str, source: Path, target: Path, arguments: list[str]) -> None:
    settings, opened = open_lora(source, arguments)
    tokenizer = _tokenizer(settings) if opened.tokens else None
    about = {"model_version": settings.model_version}
    _write(lora_files(opened, target, kind, lora.outline(settings), tokenizer, about), shortcomings(opened, kind))


def merge_lora(source: Path, target: Path, arguments: list[str]) -> None:
    settings, opened = open_lora(source, arguments)
    base = settings.generator_checkpoint_path
    if base is None:
        raise UserError("lora-merged needs the weights that the LoRA was trained on: give generator_checkpoint_path")
    tokens = Lora({})
    if opened.tokens:
        tokens = tokens.with_tokens(opened.tokens, opened.token_initial, opened.token_delta * settings.strength)
    beside = token_files(tokens, target)
    check_new([target, *beside], OTHER_NAME)
    network = build.stage_c(settings)
    lora.merge_loras(network, [(opened, settings.strength)])
    dtypes = {name: tensor.dtype for name, tensor in read_weights(base, "generator_checkpoint_path").items()}
    merged = {name: tensor.to(dtypes[name]) for name, tensor in network.state_dict().items()}
    about = {TARGET_KEY: settings.diffusion_target, "model_version": settings.model_version}
    _write({target: (merged, about)} | beside, shortcomings(opened, "merged"))


def _tokenizer(settings: CascadeSettings) -> Tokenizer:
    """That of the text tower; public ones have CLIP's, for which nothing has to be loaded."""
    file = Path(settings.clip_text_model_name or settings.version.text_tower)
    return build.text(settings).tokenizer if file.is_file() else BytePairTokenizer()


# ------------------------------------------------------------------ ControlNet


class ControlNetExportSettings(Settings):
    """Keys of the ControlNet formats."""

    controlnet_filter: str | None = None
    """The filter of its training, where the file does not say it."""
    controlnet_filter_params: dict[str, Any] | None = None
    """Arguments of the filter."""
    controlnet_blocks: list[NonNegativeInt] | None = None
    """The controlled blocks, where the file does not say them."""
    use_ema: bool = True
    """Of a run, take the averaged weights, where there are some."""


def export_controlnet(for_reference: bool, source: Path, target: Path, arguments: list[str]) -> None:
    said = load_config(ControlNetExportSettings, arguments).model_dump(exclude_none=True)
    file = weights_in(source, "controlnet", said.pop("use_ema"))
    if for_reference:
        (state, notes), about = published_layout(file), {}
    else:
        state, notes = read_weights(file, "controlnet"), []
        about = file_metadata(settings_of_file(file, said))
    _write({target: (state, about)}, notes + comfyui_notes(settings_of_file(file, said), state))


# ------------------------------------------------------------------ the command line

FOLDERS = ("diffusers", "from-diffusers", "lora-peft")
"""Formats whose target is a folder."""
FORMATS: dict[str, Callable[[Path, Path, list[str]], None]] = {
    "diffusers": to_diffusers,
    "from-diffusers": from_diffusers,
    "lora": partial(export_lora, "warpcore"),
    "lora-comfyui": partial(export_lora, "comfyui"),
    "lora-kohya": partial(export_lora, "kohya"),
    "lora-onetrainer": partial(export_lora, "onetrainer"),
    "lora-peft": partial(export_lora, "peft"),
    "lora-reference": partial(export_lora, "reference"),
    "lora-merged": merge_lora,
    "controlnet": partial(export_controlnet, False),
    "controlnet-reference": partial(export_controlnet, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("source", type=local_path)
    parser.add_argument("target", type=local_path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="key=value or --key value")
    given = parser.parse_args()
    if not given.source.exists():
        raise UserError(f"{given.source} does not exist")
    _check_target(given.format, given.target)
    try:
        FORMATS[given.format](given.source, given.target, given.arguments)
    except ModuleNotFoundError as error:
        raise UserError(f"{given.format} needs {error.name}: pip install diffusers transformers") from error


def _check_target(form: str, target: Path) -> None:
    """Raise UserError for a place that can't be written to; see `check_new` for single files."""
    if form in FOLDERS:
        if not target.is_dir():
            check_new([target], OTHER_NAME)
        elif any(target.iterdir()):
            raise UserError(f"{target} is not empty: name another folder")
        return
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: {form} writes a safetensors file: name it {target}.safetensors")
    check_new([target], OTHER_NAME)


def _write(files: Files, notes: list[str]) -> None:
    check_new(files, OTHER_NAME)
    write_files(files)
    _print_sizes(list(files))
    for note in notes:
        print(f"{note}.")


def _print_sizes(files: list[Path]) -> None:
    for file in files:
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
