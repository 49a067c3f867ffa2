"""The shipped mini T5: what the demo captions say can be read from its states."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from families.common.t5 import T5TextEncoder
from tools.demo_scenes import UNSEEN_PAIRS, Scene, captioned_scene

FILE = Path(__file__).parents[3] / "models" / "mini" / "t5.safetensors"
LENGTH = 24


@cache
def encoder() -> T5TextEncoder:
    return T5TextEncoder.load(FILE, length=LENGTH)


@torch.no_grad()
def captions(count: int, seed: int, **options) -> tuple[Tensor, list[Scene]]:
    """Mean, largest and smallest states of captions, and a one: (N, 3 D + 1); and the scenes that they describe."""
    rng = np.random.default_rng(seed)
    scenes, texts = zip(*(captioned_scene(rng, **options) for _ in range(count)), strict=True)
    conditions = encoder()(texts)
    hidden, padding = conditions.hidden.double(), ~conditions.mask[..., None]
    mean = hidden.sum(dim=1) / conditions.lengths[:, None]
    largest, smallest = hidden.masked_fill(padding, -1e9).amax(dim=1), hidden.masked_fill(padding, 1e9).amin(dim=1)
    return torch.cat([mean, largest, smallest, torch.ones_like(mean[:, :1])], dim=1), list(scenes)


def test_it_is_small_and_knows_every_word_of_the_captions():
    assert FILE.stat().st_size < 2_000_000
    rng = np.random.default_rng(0)
    texts = [captioned_scene(rng)[1] for _ in range(500)]
    tokens = encoder().tokenize(texts)
    assert not (tokens.ids == encoder().tokenizer.unk_token_id).any()
    assert not any(encoder().are_cut(texts))


@pytest.mark.parametrize(
    ("share", "options"),
    [(0.95, {"held_out": True}), (0.9, {"pairs": tuple(sorted(UNSEEN_PAIRS))})],
    ids=["sentences of the test set", "pairs of colour and shape that no picture had"],
)
def test_a_linear_probe_reads_colour_shape_place_and_count_of_new_captions(share, options):
    seen, scenes = captions(3000, seed=0)
    new, others = captions(500, seed=1, **options)
    for attribute in ("colour", "shape", "position", "count"):
        values = sorted({getattr(scene, attribute) for scene in scenes})
        wanted = torch.tensor([[float(getattr(scene, attribute) == value) for value in values] for scene in scenes])
        probe = torch.linalg.lstsq(seen, wanted.double()).solution
        found = (new @ probe).argmax(dim=1).tolist()
        right = sum(values[place] == getattr(scene, attribute) for place, scene in zip(found, others, strict=True))
        assert right >= share * len(others), attribute
