"""Conditions of Stage C: what the towers make of captions and pictures."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from families.cascade.config import StageCConfig
from families.common.captions import captions_kept
from families.common.features import stored
from modules.clip import ImageTower, TextTower
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom
from warpcore.transfer import to_device

TEXT = ("clip_text", "clip_text_pooled")
Texts = Callable[[Sequence[str]], dict[str, Tensor]]
"""Gives the text conditions of captions."""


def text_conditions(tower: TextTower, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """`clip_text` (B, L, D) and `clip_text_pooled` (B, 1, P) of captions."""
    ids, mask = (to_device(tensor, device) for tensor in tower.tokenize(list(captions)))
    hidden, pooled = tower.encode(ids, mask)
    return {"clip_text": hidden, "clip_text_pooled": pooled[:, None]}


def training_text(texts: Texts, batch: Batch, random: SampleRandom, dropout: float) -> dict[str, Tensor]:
    """The text conditions of a training batch; a share of its captions, chosen at random, is replaced by an empty one.

    Gives those conditions that the batch brings along from a cache, else all.
    """
    known = {name: value for name in TEXT if (value := stored(batch, name)) is not None}
    if not known:
        kept = captions_kept(random.on_cpu, dropout)
        return texts([caption if keep else "" for caption, keep in zip(batch.captions, kept.tolist(), strict=True)])
    kept, empty = captions_kept(random, dropout), texts([""])
    return {name: torch.where(kept[:, None, None], value.to(empty[name].dtype), empty[name])
            for name, value in known.items()}  # fmt: skip


def training_conditions(
    texts: Texts, image: ImageTower | None, width: int, batch: Batch, random: SampleRandom, config: StageCConfig
) -> dict[str, Tensor]:
    """All conditions of Stage C for a training batch; each of a sample's conditions is dropped at random.

    Args:
        image: None where every image condition is dropped, or comes from a cache.
        width: of the image condition.
    """
    conditions = training_text(texts, batch, random, config.caption_dropout)
    conditions["clip_img"] = torch.zeros(len(batch.keys), 1, width, device=random.device)
    shown = random.on_cpu.uniform("image condition dropout") >= config.clip_image_dropout
    known = stored(batch, "clip_img")
    if (image is not None or known is not None) and shown.any():
        rows = to_device(shown.nonzero().flatten(), random.device)
        seen = image.encode(batch.images[rows].float() / 255) if known is None else known[rows]
        conditions["clip_img"][rows, 0] = seen.to(conditions["clip_img"].dtype)
    return conditions
