"""What the cascade exports and imports: the formats of `tools/export.py`."""

from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt

from families.cascade import build, lora
from families.cascade.controlnet import comfyui_notes, file_metadata, published_layout, settings_of_file
from families.cascade.inference import CascadeSettings
from families.cascade.lora_files import lora_files, read_lora, shortcomings, token_files
from families.cascade.lora_formats import Lora
from families.common.exports import OTHER_NAME, print_sizes, write_new_files
from families.common.lora import merge_loras
from families.common.lora_training import train_tokens
from families.common.weight_files import TARGET_KEY, metadata_of, weights_in
from families.common.weights import read_weights
from modules.tokenizers import BytePairTokenizer, Tokenizer
from warpcore.config import FileName, Settings, load_config
from warpcore.errors import UserError
from warpcore.outputs import check_new

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
    print_sizes(read_folder(source, target))


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
    rows = train_tokens(build.text(settings), settings.train_tokens) if settings.train_tokens else None
    return settings, read_lora(Path(settings.lora[0]), lora.outline(settings), settings.module_filters, rows)


def export_lora(kind: str, source: Path, target: Path, arguments: list[str]) -> None:
    settings, opened = open_lora(source, arguments)
    tokenizer = _tokenizer(settings) if opened.tokens else None
    about = {"model_version": settings.model_version}
    write_new_files(
        lora_files(opened, target, kind, lora.outline(settings), tokenizer, about), shortcomings(opened, kind)
    )


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
    merge_loras(network, [(opened, settings.strength)])
    dtypes = {name: tensor.dtype for name, tensor in read_weights(base, "generator_checkpoint_path").items()}
    merged = {name: tensor.to(dtypes[name]) for name, tensor in network.state_dict().items()}
    about = {TARGET_KEY: settings.diffusion_target, "model_version": settings.model_version}
    write_new_files({target: (merged, about)} | beside, shortcomings(opened, "merged"))


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
    write_new_files({target: (state, about)}, notes + comfyui_notes(settings_of_file(file, said), state))
