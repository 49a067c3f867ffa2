"""CLIP weight files: finding them, reading the part that one tower needs, and translating Hugging Face's names."""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from torch import Tensor

from modules.pickled_weights import read_pickled_tensors
from modules.safetensors_files import open_weights

# The names that the public training configs use, as open_clip's model and pretrained tag.
PUBLIC_NAMES = {
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": ("ViT-bigG-14", "laion2b_s39b_b160k"),
    "openai/clip-vit-large-patch14": ("ViT-L-14", "openai"),
}
DEFAULT_TAGS = dict(PUBLIC_NAMES.values())
SETTINGS_KEY = "clip_settings"

# Hugging Face's name -> open_clip's, for the layers of a block and for what stands outside of the blocks.
LAYERS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
OUTSIDE = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
    "vision_model.embeddings.class_embedding": "class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "positional_embedding",
    "vision_model.pre_layrnorm.weight": "ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "ln_pre.bias",
    "vision_model.post_layernorm.weight": "ln_post.weight",
    "vision_model.post_layernorm.bias": "ln_post.bias",
    "visual_projection.weight": "proj",
}
_TRANSPOSED = ("text_projection.weight", "visual_projection.weight")
# Of a whole open_clip model, but of neither tower; and a buffer of old Hugging Face files.
_NOT_OF_A_TOWER = ("logit_scale", "logit_bias", "attn_mask", "input_resolution", "context_length", "vocab_size")


def load_open_clip() -> ModuleType:
    """The package open_clip, imported at its first use: that takes seconds, and only towers need it."""
    with torch.device("cpu"):  # networks are built under the meta device, which is no place for a package's constants
        import open_clip
    return open_clip


def model_and_tag(name: str) -> tuple[str, str]:
    """open_clip's model and pretrained tag for a public name, `model` or `model:tag`. Raises ValueError."""
    if name in PUBLIC_NAMES:
        return PUBLIC_NAMES[name]
    open_clip = load_open_clip()
    model, _, tag = name.partition(":")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if not tags:
        raise ValueError(f"no CLIP model {name!r}: write {' or '.join(PUBLIC_NAMES)}, or open_clip's `model:tag`")
    tag = tag or DEFAULT_TAGS.get(model, "")
    if not open_clip.is_pretrained_cfg(model, tag):
        raise ValueError(f"CLIP model {name!r} needs one of open_clip's pretrained tags: {model}:({'|'.join(tags)})")
    return model, tag


def download(name: str) -> Path:
    """The file of a public model, downloaded by open_clip unless its cache has it."""
    open_clip = load_open_clip()
    return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(*model_and_tag(name))))


def find_file(path: str | Path) -> Path:
    """The weight file at `path`, or in it where it is a folder. Raises FileNotFoundError."""
    path = Path(path)
    if path.is_dir():
        for candidate in ("model.safetensors", "open_clip_model.safetensors"):
            if (path / candidate).is_file():
                return path / candidate
        raise FileNotFoundError(f"CLIP weights: the folder {path} holds no model.safetensors")
    if not path.is_file():
        raise FileNotFoundError(f"CLIP weights: there is no file {path}")
    return path


def read_settings(path: Path) -> dict | None:
    """The tower settings in the metadata of a file that `save` of a tower wrote; None for other files.

    Raises ValueError where they are damaged.
    """
    if path.suffix != ".safetensors":
        return None
    try:
        with open_weights(path) as file:
            text = (file.metadata() or {}).get(SETTINGS_KEY)
        return None if text is None else json.loads(text)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as the weights of a CLIP tower: {error}") from error


def read_tower(path: Path, kind: str) -> dict[str, Tensor]:
    """The weights of the "text" or "image" tower in a file, in the names of open_clip's tower class.

    The file holds a whole CLIP or one tower, in open_clip's or Hugging Face's names; of a safetensors file only the
    tower's own tensors are read.

    Raises ValueError where it is damaged.
    """
    try:
        if path.suffix == ".safetensors":
            with open_weights(path) as file:
                return _select(file.keys(), file.get_tensor, kind)
        tensors = read_pickled_tensors(path, mmap=True)
        return _select(tensors.keys(), tensors.__getitem__, kind)
    except (SafetensorError, ValueError, RuntimeError) as error:  # the last of tensors that do not fit together
        raise ValueError(f"{path} cannot be read as weights: {error}") from error


def _select(names: Iterable[str], read: Callable[[str], Tensor], kind: str) -> dict[str, Tensor]:
    names = [name for name in names if name not in _NOT_OF_A_TOWER and not name.endswith(".position_ids")]
    if any(name.startswith(("text_model.", "vision_model.")) for name in names):
        own = ("text_model.", "text_projection.") if kind == "text" else ("vision_model.", "visual_projection.")
        return convert_hugging_face({name: read(name) for name in names if name.startswith(own)})
    if kind == "image":
        return {n.removeprefix("visual."): read(n) for n in names if n.startswith("visual.")}
    if any(name.startswith("text.") for name in names):
        return {name.removeprefix("text."): read(name) for name in names if name.startswith("text.")}
    return {name: read(name) for name in names if not name.startswith("visual.")}


def convert_hugging_face(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tower's weights from the names of transformers' CLIP classes to those of open_clip's tower classes."""
    converted = {}
    for name, tensor in tensors.items():
        block = re.fullmatch(r"(?:text|vision)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if not block:
            converted[OUTSIDE.get(name, name)] = tensor.T.contiguous() if name in _TRANSPOSED else tensor
            continue
        number, layer, parameter = block.groups()
        prefix = f"transformer.resblocks.{number}"
        if layer == "self_attn.q_proj":
            rest = (tensors.get(name.replace("q_proj", part)) for part in ("k_proj", "v_proj"))
            parts = [part for part in (tensor, *rest) if part is not None]
            converted[f"{prefix}.attn.in_proj_{parameter}"] = torch.cat(parts)
        elif layer not in ("self_attn.k_proj", "self_attn.v_proj"):
            converted[f"{prefix}.{LAYERS.get(layer, layer)}.{parameter}"] = tensor
    return converted
