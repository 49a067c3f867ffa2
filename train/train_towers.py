"""Train a small text tower and a small image tower together: CLIP (arXiv:2103.00020) on captioned pictures.

    python3 train/train_towers.py configs/training/mini_towers.yaml

The text tower of a cascade must tell apart what its pictures differ in. A caption and its picture are pulled together,
the other captions of the micro-batch pushed away. The run's folder gets `text_tower.safetensors` and
`image_tower.safetensors`, with their settings inside. With `text_encoder: t5` the text tower is a T5 encoder, for
families whose networks read T5's states.
"""

import warpcore.openmp
import math
from typing import Annotated, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from families.common.captions import say_of_captions
from families.common.t5_tower import T5Tower
from modules.clip import ClipSettings, ImageTower, TextTower
from warpcore.config import Config
from warpcore.core import Losses, WarpCore
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom
from warpcore.transfer import to_device

Layers = Annotated[int, Field(gt=0, le=1000)]


class TowersConfig(Config):
    unused = frozenset({"output_path"})  # no pictures are drawn

    words: list[str] = Field(min_length=1)
    """Every word and punctuation mark that captions use; all others count as one unknown word."""
    text_encoder: Literal["clip", "t5"] = "clip"
    """What the text tower is: CLIP's causal transformer, or T5's encoder, whose states do not depend on padding."""
    tower_width: Annotated[int, Field(gt=0, le=8192)] = 64
    """Channels of both towers, and width of the vectors they give."""
    tower_heads: Annotated[int, Field(gt=0, le=1024)] = 4
    """Attention heads of both towers."""
    text_width: Annotated[int, Field(gt=0, le=8192)] | None = None
    """Channels of the text tower; by default those of `tower_width`."""
    text_length: Annotated[int, Field(gt=2, le=10_000)] = 24
    """Tokens of a caption, its begin and end included; longer captions are cut."""
    text_layers: Layers = 3
    """Blocks of the text tower."""
    image_layers: Layers = 3
    """Blocks of the image tower."""
    image_tower_size: Annotated[int, Field(gt=0, le=4096)] = 48
    """Side in pixels at which the image tower sees the middle square of a picture."""
    image_tower_patch: PositiveInt = 8
    """Side in pixels of one position of the image tower."""

    @model_validator(mode="after")
    def _dividing(self) -> Self:
        for key in ("tower_width", "text_width"):
            if (width := getattr(self, key)) is not None and width % self.tower_heads:
                raise ValueError(f"tower_heads: {self.tower_heads} does not divide {key} {width}")
        if self.image_tower_size % self.image_tower_patch:
            raise ValueError(
                f"image_tower_patch: {self.image_tower_patch} does not divide image_tower_size {self.image_tower_size}"
            )
        return self

    @property
    def clip(self) -> ClipSettings:
        width = self.tower_width
        text = {"width": self.text_width or width, "heads": self.tower_heads, "layers": self.text_layers}
        image = {"width": width, "head_width": width // self.tower_heads, "layers": self.image_layers}
        return ClipSettings(
            embed_dim=width,
            text_cfg=text | {"context_length": self.text_length},
            vision_cfg=image | {"image_size": self.image_tower_size, "patch_size": self.image_tower_patch},
            words=self.words,
        )


class Temperature(nn.Module):
    """Multiplies similarities by a learnt factor that starts at 1/0.07 and stays below 100, as in the paper."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))  # sharding takes no scalars

    def forward(self, similarities: Tensor) -> Tensor:
        return similarities * self.log_scale.exp().clamp(max=100)


class TrainTowers(WarpCore):
    Config = TowersConfig
    trainable = {"text": {}, "image": {}, "temperature": {}}
    bucket_factor = 32

    def build(self) -> dict[str, nn.Module]:
        settings = self.config.clip
        kind = TextTower if self.config.text_encoder == "clip" else T5Tower
        return {"text": kind(settings), "image": ImageTower(settings), "temperature": Temperature()}

    def setup(self) -> None:
        super().setup()
        say_of_captions(self)

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = self.networks["text"].tokenize(batch.captions)
        return batch.images.float() / 255, to_device(ids, self.device), to_device(mask, self.device)

    def loss(self, inputs: tuple[Tensor, Tensor, Tensor], random: SampleRandom) -> Losses:
        pictures, ids, mask = inputs
        image = F.normalize(self.networks["image"](pictures).float(), dim=1)
        text = F.normalize(self.networks["text"](ids, mask)[1].float(), dim=1)
        logits = self.networks["temperature"](image @ text.T)
        own = torch.arange(len(logits), device=logits.device)
        loss = (F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")) / 2
        found = (logits.argmax(dim=1) == own).float()
        return Losses(loss, loss, metrics={"own_caption_found": found})

    def weights(self) -> dict[str, dict[str, Tensor]]:
        return {f"{name}_tower": self.networks[name].weights_to_save() for name in ("text", "image")}

    def file_metadata(self) -> dict[str, str]:
        return self.networks["image"].metadata_to_save() | self.networks["text"].metadata_to_save()


if __name__ == "__main__":
    TrainTowers.main()
