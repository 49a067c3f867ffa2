"""Build the networks of the cascade and load their weights, strictly."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from families.cascade.config import ModelSettings
from families.common.weights import WeightsError, existing_file, with_weights
from modules.clip import ClipSettings, ImageTower, TextTower, image_tower, text_tower, tower_file, tower_settings
from modules.effnet import EfficientNetEncoder
from modules.previewer import Previewer
from modules.stage_a import StageA
from modules.stage_b import StageB
from modules.stage_c import StageC
from modules.tokenizers import Tokenizer
from warpcore.meta import are_only_shapes

Tower = TypeVar("Tower", TextTower, ImageTower)
Made = TypeVar("Made")


def stage_c(settings: ModelSettings, dtype: torch.dtype = torch.float32) -> StageC:
    """Stage C; random weights where the settings name no file."""
    path = settings.generator_checkpoint_path
    return with_weights(
        lambda: StageC(**settings.version.stage_c), path, "generator_checkpoint_path", dtype=dtype, deferrable=True
    )


def stage_b(
    settings: ModelSettings, dtype: torch.dtype = torch.float32, key: str = "generator_checkpoint_path"
) -> StageB:
    """Stage B; random weights where the settings name no file, for which the user wrote `key`."""
    path = settings.generator_checkpoint_path
    return with_weights(lambda: StageB(**settings.version.stage_b), path, key, dtype=dtype, deferrable=True)


def stage_a(settings: ModelSettings, from_scratch: bool = False) -> StageA:
    """Stage A, between pictures and Stage B's latents, with its weights (or random ones)."""
    path = None if from_scratch else stage_a_file(settings)
    return with_weights(lambda: StageA(**settings.version.stage_a), path, "stage_a_checkpoint_path")


def stage_a_file(settings: ModelSettings) -> Path:
    """Where the weights of Stage A are."""
    return settings.stage_a_checkpoint_path or settings.version.folder / "stage_a.safetensors"


def encoder(settings: ModelSettings, from_scratch: bool = False) -> EfficientNetEncoder:
    """The encoder that makes Stage C's latents, with its weights (or random ones)."""
    path = None if from_scratch else encoder_file(settings)
    network = with_weights(lambda: EfficientNetEncoder(**settings.version.encoder), path, "effnet_checkpoint_path")
    return network.to(memory_format=torch.channels_last)


def encoder_file(settings: ModelSettings) -> Path:
    """Where the weights of the encoder are."""
    return settings.effnet_checkpoint_path or settings.version.folder / "effnet_encoder.safetensors"


def previewer(settings: ModelSettings, from_scratch: bool = False) -> Previewer:
    """The previewer that turns Stage C's latents into small pictures, with its weights (or random ones)."""
    path = None if from_scratch else previewer_file(settings)
    network = with_weights(lambda: Previewer(**settings.version.previewer), path, "previewer_checkpoint_path")
    return network.to(memory_format=torch.channels_last)


def previewer_file(settings: ModelSettings) -> Path:
    """Where the weights of the previewer are."""
    return settings.previewer_checkpoint_path or settings.version.folder / "previewer.safetensors"


def has_previewer(settings: ModelSettings) -> bool:
    """Whether they are there, or have to be: a path that was given and leads nowhere is an error of `previewer`."""
    return settings.previewer_checkpoint_path is not None or are_only_shapes() or previewer_file(settings).is_file()


def text(settings: ModelSettings, token_ids: str = "clip") -> TextTower:
    """The text tower, with its weights; `token_ids` as `BytePairTokenizer` knows them."""
    tower = _tower(_shape(TextTower, text_tower), *_text_source(settings), "clip_text_model_name")
    tower.tokenizer = tower.settings.tokenizer(token_ids)
    return tower


def text_tokenizer(settings: ModelSettings, token_ids: str) -> Tokenizer:
    """The tokenizer of the text tower, without its weights."""
    return _tower(tower_settings, *_text_source(settings), "clip_text_model_name").tokenizer(token_ids)


def image(settings: ModelSettings) -> ImageTower:
    """The image tower, with its weights."""
    return _tower(_shape(ImageTower, image_tower), *_image_source(settings), "clip_image_model_name")


def network_file(settings: ModelSettings, network: str) -> Path:
    """The weights of a network that makes latents or conditions: `encoder`, `stage_a`, `text` or `image`.

    Raises:
        WeightsError: there is no such file, or the name of a tower is not known.
    """
    match network:
        case "encoder":
            return existing_file(encoder_file(settings), "effnet_checkpoint_path")
        case "stage_a":
            return existing_file(stage_a_file(settings), "stage_a_checkpoint_path")
        case "text":
            return _tower(tower_file, *_text_source(settings), "clip_text_model_name")
        case "image":
            return _tower(tower_file, *_image_source(settings), "clip_image_model_name")
    raise ValueError(f"{network!r} makes neither latents nor conditions")


def _text_source(settings: ModelSettings) -> tuple[str | None, Path | None]:
    """Public name and file of the text tower."""
    return _source(settings.clip_text_model_name or settings.version.text_tower, settings.clip_text_checkpoint_path)


def _image_source(settings: ModelSettings) -> tuple[str | None, Path | None]:
    """Public name and file of the image tower."""
    return _source(settings.clip_image_model_name or settings.version.image_tower, settings.clip_image_checkpoint_path)


def _source(name: str, path: Path | None) -> tuple[str | None, Path | None]:
    return (None, path or Path(name)) if name.endswith((".safetensors", ".pt", ".bin")) else (name, path)


def _shape(kind: type[Tower], load: Callable[[str | None, Path | None], Tower]) -> Callable:
    """What makes a tower: with its weights by `load`, or inside `only_shapes` from a public name alone."""

    def make(name: str | None, path: Path | None) -> Tower:
        if name is None or not are_only_shapes():
            return load(name, path)
        with torch.device("meta"):
            return kind(ClipSettings.published(name))

    return make


def _tower(make: Callable[[str | None, Path | None], Made], name: str | None, path: Path | None, key: str) -> Made:
    try:
        return make(name, path)
    except (ValueError, OSError) as error:
        raise WeightsError(f"{key}: {error}") from error
