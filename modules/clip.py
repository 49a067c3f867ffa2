"""The CLIP towers that condition Stage C, built from open_clip's classes: text or image, never both for one.

`text_tower(name)` and `image_tower(name)` give a frozen tower with published weights; `TextTower(settings)` and
`ImageTower(settings)` give one with fresh weights, to train. A tower's `save` writes its settings into the file, so
that `text_tower(path=...)` is enough to load it again. open_clip is imported when the first tower is built.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode

from modules.clip_weights import (
    SETTINGS_KEY,
    download,
    find_file,
    load_open_clip,
    model_and_tag,
    read_settings,
    read_tower,
)
from modules.effnet import normalise_images
from modules.tokenizers import BytePairTokenizer, ExtendedTokenizer, WordTokenizer, tokenize

MAX_LAYERS = 1000
"""A file whose settings say more is damaged."""
# Normalisation of OpenAI's CLIP models, as in open_clip's OPENAI_DATASET_MEAN and OPENAI_DATASET_STD.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ClipSettings:
    """What a CLIP model is, apart from its weights. The first four fields are open_clip's model configuration."""

    embed_dim: int
    """Width of the projected vectors of both towers."""
    text_cfg: dict | None = None
    """open_clip's text tower: width, heads, layers, context_length (L), vocab_size."""
    vision_cfg: dict | None = None
    """open_clip's image tower: width, head_width, layers, image_size (px), patch_size (px)."""
    quick_gelu: bool = False
    """x * sigmoid(1.702 x) in place of GELU: OpenAI's weights."""
    words: list[str] | None = None
    """Vocabulary of a word tokenizer, which also sets vocab_size; None is CLIP's byte-pair tokenizer."""
    begin_id: int | None = None
    """Id of the first token; None is the tokenizer's."""
    end_id: int | None = None
    """Id of the token that ends a text, at which the pooled vector is taken; None is the tokenizer's."""
    pad_id: int | None = None
    """Id that fills short texts; None is end_id, as Stable Cascade was trained (open_clip's own habit is 0)."""
    image_mean: tuple[float, ...] = OPENAI_MEAN
    """Mean of the RGB channels that the image tower expects to be taken off."""
    image_std: tuple[float, ...] = OPENAI_STD
    """Deviation of the RGB channels that the image tower expects to be divided by."""

    def tokenizer(self, ids: Literal["clip", "open_clip"] = "clip") -> BytePairTokenizer | WordTokenizer:
        """The tokenizer; `ids` as `BytePairTokenizer` knows them."""
        return BytePairTokenizer(ids) if self.words is None else WordTokenizer(self.words)

    @classmethod
    def published(cls, name: str) -> "ClipSettings":
        """Those of a public name (see `PUBLIC_NAMES`), `model` or `model:tag` of open_clip. Raises ValueError."""
        open_clip = load_open_clip()
        model, tag = model_and_tag(name)
        config, pretrained = open_clip.get_model_config(model), open_clip.get_pretrained_cfg(model, tag)
        return cls(
            embed_dim=config["embed_dim"],
            text_cfg=config["text_cfg"],
            vision_cfg=config["vision_cfg"],
            quick_gelu=config.get("quick_gelu", False) or pretrained.get("quick_gelu", False),
            image_mean=pretrained["mean"],
            image_std=pretrained["std"],
        )


class _Tower(nn.Module):
    """What the two towers have in common: a file that says everything needed to load it."""

    kind: str
    prefix: str
    """Of the tower's parameters in a file of a whole CLIP model."""
    forward_methods = ("encode",)  # called from outside like `forward`
    settings: ClipSettings
    model: nn.Module

    def weights_to_save(self) -> dict[str, Tensor]:
        """The weights under open_clip's names in a whole CLIP model."""
        return {self.prefix + name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}

    def metadata_to_save(self) -> dict[str, str]:
        """The settings, as the metadata of a safetensors file."""
        return {SETTINGS_KEY: json.dumps(asdict(self.settings))}

    def save(self, path: str | Path) -> None:
        """Write weights and settings to a safetensors file."""
        save_file(self.weights_to_save(), path, metadata=self.metadata_to_save())


class TextTower(_Tower):
    """A causal CLIP text transformer. `model` is open_clip's, `token_embedding` its nn.Embedding.

    Attributes: `length` L, tokens per text; `width` D; `pooled_width` P; `begin_id`, `end_id`, `pad_id`.
    """

    kind, prefix = "text", ""

    def __init__(self, settings: ClipSettings):
        super().__init__()
        self.settings = settings
        self.tokenizer = settings.tokenizer()
        config = dict(settings.text_cfg or {})
        if "hf_model_name" in config or config.get("embed_cls") or config.get("no_causal_mask"):
            raise ValueError("only CLIP's own causal text transformer can be a text tower; choose another CLIP model")
        config.setdefault("vocab_size", self.tokenizer.vocab_size)
        self.model = load_open_clip().model._build_text_tower(settings.embed_dim, config, settings.quick_gelu)
        self.model.attn_mask = None  # `encode` makes its own
        self.length, self.width, self.pooled_width = self.model.context_length, self.model.width, settings.embed_dim
        self.begin_id, self.end_id = (
            own if given is None else given
            for given, own in (
                (settings.begin_id, self.tokenizer.begin_id),
                (settings.end_id, self.tokenizer.end_id),
            )
        )
        self.pad_id = self.end_id if settings.pad_id is None else settings.pad_id

    @property
    def token_embedding(self) -> nn.Embedding:
        """One row per token id. It may be replaced by one with further rows."""
        return self.model.token_embedding

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.tokenizer.vocab_size

    @property
    def vocabulary(self) -> dict[str, int]:
        """The tokens that stand for text, with their ids."""
        return self.tokenizer.vocabulary

    def extend(self, embedding: nn.Module, names: Sequence[str]) -> None:
        """Embed token ids with another table, and read further tokens, see `modules.tokens.TextEncoder`."""
        self.model.token_embedding = embedding
        if names:
            self.tokenizer = ExtendedTokenizer(self.tokenizer, names)

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) int64 and mask (B, L) bool, True from the begin to the end token, both on the CPU."""
        return tokenize(self.tokenizer, texts, self.length, self.pad_id)

    def encode(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The two text conditions of token ids (B, L).

        mask (B, L) hides padded positions from the others; None hides nothing.
        Returns hidden (B, L, D), the last hidden states before the final norm, padded positions included, and pooled
        (B, P), the projection of the normed state at the first end token, not of unit length.
        """
        ids = ids.to(self.model.positional_embedding.device)
        x = self.token_embedding(ids) + self.model.positional_embedding[: ids.shape[1]]
        hidden = self.model.transformer(x, attn_mask=self._attention_mask(ids, mask, x.dtype))
        ends = (ids == self.end_id).int().argmax(dim=1)
        at_end = hidden[torch.arange(len(ids), device=ids.device), ends]
        return hidden, self.model.ln_final(at_end) @ self.model.text_projection

    forward = encode

    def _attention_mask(self, ids: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Added to the attention logits: 0 for keys that a query may see, -inf for later and padded ones."""
        length = ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        if mask is not None:
            seen = seen & mask.to(ids.device, torch.bool)[:, None, :]
        added = torch.zeros(seen.shape, dtype=dtype, device=ids.device).masked_fill_(~seen, float("-inf"))
        # nn.MultiheadAttention wants (L, L) or one per text and head.
        return added if mask is None else added.repeat_interleave(self.model.heads, dim=0)


class ImageTower(_Tower):
    """A CLIP vision transformer. `model` is open_clip's; `pooled_width` is P, `image_size` is its side in px."""

    kind, prefix = "image", "visual."

    def __init__(self, settings: ClipSettings):
        super().__init__()
        self.settings = settings
        config = dict(settings.vision_cfg or {})
        if "timm_model_name" in config or isinstance(config.get("layers"), list):
            raise ValueError("only CLIP's own vision transformer can be an image tower; choose another CLIP model")
        self.model = load_open_clip().model._build_vision_tower(settings.embed_dim, config, settings.quick_gelu)
        self.pooled_width, self.image_size = settings.embed_dim, self.model.image_size[0]

    def preprocess(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] -> their centre squares at the tower's size, normalised, in float32."""
        images = TF.resize(images.float(), [self.image_size], InterpolationMode.BICUBIC, antialias=True)
        images = TF.center_crop(images, [self.image_size])
        return normalise_images(images, self.settings.image_mean, self.settings.image_std)

    @property
    def width(self) -> int:
        """D of its patches."""
        return self.model.conv1.out_channels

    def patches(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """The last hidden states (B, rows * columns, D), normed, of patches of pictures (B, 3, H, W) in [0, 1].

        Whole pictures are stretched to `grid` (rows, columns) patches. The positions of a grid that the tower was not
        trained on lie between those that it learned.

        Raises:
            ValueError: the tower pools its patches in a way that leaves none.
        """
        model, dtype = self.model, self.model.conv1.weight.dtype
        if model.attn_pool is not None:
            raise ValueError("an image tower with attentional pooling has no patches: choose another")
        size = [side * px for side, px in zip(grid, model.patch_size, strict=True)]
        stretched = TF.resize(images.float(), size, InterpolationMode.BICUBIC, antialias=True)
        pixels = normalise_images(stretched, self.settings.image_mean, self.settings.image_std)
        x = model.conv1(pixels.to(dtype)).flatten(2).transpose(1, 2)
        first, positions = model.positional_embedding[:1], model.positional_embedding[1:]
        if tuple(grid) != tuple(model.grid_size):
            table = positions.float().T.unflatten(1, tuple(model.grid_size))[None]
            table = F.interpolate(table, tuple(grid), mode="bicubic", align_corners=False)
            positions = table[0].flatten(1).T.to(positions.dtype)
        x = torch.cat([(model.class_embedding + first).expand(len(x), 1, -1), x + positions], dim=1)
        return model.ln_post(model.transformer(model.ln_pre(x)))[:, 1:]

    def encode(self, images: Tensor) -> Tensor:
        """The image condition (B, P) of pictures (B, 3, H, W) in [0, 1]: projected, not of unit length."""
        weight = self.model.conv1.weight
        return self.model(self.preprocess(images.to(weight.device)).to(weight.dtype))

    forward = encode


def text_tower(
    name: str | None = None,
    path: str | Path | None = None,
    *,
    settings: ClipSettings | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> TextTower:
    """A frozen text tower in eval mode.

    Args:
        name: of a public model: the training configs' Hugging Face name, or open_clip's `model` or `model:tag`.
        path: its weights; a file of open_clip or Hugging Face (a whole CLIP or this tower), a folder with one, or a
            file that `save` wrote, which needs no name. Without a path, open_clip downloads the name's weights.
        settings: in place of a name, for a file of another size.
        device, dtype: where and as what the weights are kept; None keeps the file's dtype.

    Raises FileNotFoundError for a missing file, ValueError for an unknown name or a file of something else.
    """
    return _load(TextTower, name, path, settings, device, dtype)


def image_tower(
    name: str | None = None,
    path: str | Path | None = None,
    *,
    settings: ClipSettings | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> ImageTower:
    """A frozen image tower in eval mode: arguments and errors as in `text_tower`."""
    return _load(ImageTower, name, path, settings, device, dtype)


def tower_file(name: str | None = None, path: str | Path | None = None) -> Path:
    """The file with the weights of the tower that the same arguments load, downloaded if need be; errors as there."""
    if name is None and path is None:
        raise ValueError("a CLIP tower needs the name of a public model or the path of a weight file")
    return download(name) if path is None else find_file(path)


def tower_settings(name: str | None = None, path: str | Path | None = None) -> ClipSettings:
    """Those of the tower that the same arguments load; errors as there."""
    if path is None:
        return ClipSettings.published(name)
    file = tower_file(name, path)
    saved = read_settings(file)
    if saved is not None:
        return _checked(saved, file)
    if name is None:
        raise ValueError(f"{file} does not say which CLIP model it holds: give its name too")
    return ClipSettings.published(name)


def _checked(saved: object, file: Path) -> ClipSettings:
    """The settings that a file says of its tower. Raises ValueError where they are damaged."""
    try:
        settings = TypeAdapter(ClipSettings).validate_python(saved)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(
            f"{file}: its settings are damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        ) from None
    layers = [(config or {}).get("layers", 0) for config in (settings.text_cfg, settings.vision_cfg)]
    if any(isinstance(count, int | float) and count > MAX_LAYERS for count in layers):
        raise ValueError(f"{file}: its settings are damaged: {max(layers)} layers")
    return settings


def _load(tower_class, name, path, settings, device, dtype):
    file = tower_file(name, path)
    settings = settings or tower_settings(name, path)
    try:
        with torch.device("meta"):  # no time and memory for weights that are replaced at once
            tower = tower_class(settings)
    except ValueError:
        raise
    except Exception as error:  # open_clip checks little of what settings say: anything may follow from them
        raise ValueError(f"{file}: its settings make no {tower_class.kind} tower: {error}") from error
    weights = read_tower(file, tower.kind)
    _check(tower, weights, file, name)
    weights = {key: tensor.to(device, dtype) for key, tensor in weights.items()}
    tower.model.load_state_dict(weights, strict=True, assign=True)
    return tower.requires_grad_(False).eval()


def _check(tower: TextTower | ImageTower, weights: dict[str, Tensor], file: Path, name: str | None) -> None:
    expected = tower.model.state_dict()
    missing, unknown = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    reshaped = [k for k in sorted(expected.keys() & weights.keys()) if expected[k].shape != weights[k].shape]
    named = {"missing": missing, "unknown": unknown}
    problems = [f"{len(keys)} {what}, such as {keys[0]}" for what, keys in named.items() if keys]
    problems += [f"{k} is {tuple(weights[k].shape)} and not {tuple(expected[k].shape)}" for k in reshaped[:1]]
    if problems:
        model = f"of {name}" if name else "of these settings"
        raise ValueError(f"{file} does not hold the {tower.kind} tower {model}: tensors {'; '.join(problems)}")
