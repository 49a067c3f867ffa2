"""Conditions of Stage C: what the towers make of captions and pictures."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.config import StageCConfig
from modules.clip import ImageTower, TextTower
from warpcore.data.reader import Batch
from warpcore.random import SampleRandom


def text_conditions(tower: TextTower, captions: Sequence[str], device: torch.device) -> dict[str, Tensor]:
    """`clip_text` (B, L, D) and `clip_text_pooled` (B, 1, P) of captions."""
    ids, mask = (tensor.to(device) for tensor in tower.tokenize(list(captions)))
    hidden, pooled = tower.encode(ids, mask)
    return {"clip_text": hidden, "clip_text_pooled": pooled[:, None]}


def prompt_conditions(tower: TextTower, prompts: Sequence[str], width: int, device: torch.device) -> dict[str, Tensor]:
    """All conditions of Stage C for prompts; the image condition, `width` wide, is absent (zeros)."""
    conditions = text_conditions(tower, prompts, device)
    return conditions | {"clip_img": torch.zeros(len(prompts), 1, width, device=device)}


def kept_captions(batch: Batch, random: SampleRandom, dropout: float) -> list[str]:
    """The captions of a training batch; a share of them, chosen at random, is empty."""
    kept = (random.uniform("caption dropout") >= dropout).tolist()
    return [caption if keep else "" for caption, keep in zip(batch.captions, kept, strict=True)]


def training_conditions(
    text: TextTower, image: ImageTower | None, width: int, batch: Batch, random: SampleRandom, config: StageCConfig
) -> dict[str, Tensor]:
    """All conditions of Stage C for a training batch; each of a sample's conditions is dropped at random.

    Args:
        image: None where every image condition is dropped.
        width: of the image condition.
    """
    captions = kept_captions(batch, random, config.caption_dropout)
    conditions = prompt_conditions(text, captions, width, random.device)
    shown = random.uniform("image condition dropout") >= config.clip_image_dropout
    if image is not None and shown.any():
        rows = shown.nonzero().flatten().to(batch.images.device)
        pictures = batch.images[rows].float() / 255
        conditions["clip_img"][rows, 0] = image.encode(pictures).to(conditions["clip_img"].dtype)
    return conditions
