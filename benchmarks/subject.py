"""How well a LoRA taught a mini a new subject, and what it made the mini forget.

    python3 benchmarks/learning.py --run runs/quickstart_lora
    python3 benchmarks/learning.py --run runs/quickstart_video_lora

The base and the LoRA draw the subject by its token, with the colours and places (of clips: motions) of the training
data and with others that they never show together or at all, and sentences of the demo world that have nothing to do
with it. Subject fidelity: the shape is the subject's. Prompt fidelity: colour, place and motion are those asked for.
The scorers are those of `benchmarks/scorer.py` and `benchmarks/clip_scorer.py`, with the subject among the shapes that
they know.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from benchmarks import clip_scorer, scorer
from families.common.scoring import Scored
from tools.demo_clips import MOTIONS
from tools.demo_scenes import COLOURS, POSITIONS, SEEN_PAIRS, SHAPES, SUBJECT
from tools.make_demo_subject import MOTIONS_SHOWN, SHOWN, moving_sentence, sentence

TARGETS = {"subject": 0.8, "colour": 0.9, "place": 0.9, "motion": 0.8}
"""What drawings of the subject should reach, at colours and places (motions) that were shown and at others."""
Prompt = tuple[str, ...]
"""A sentence, and what it asks for: a colour, a place, of clips a motion."""


def subject_prompts(shown: bool) -> list[Prompt]:
    """(sentence, colour, place) of the colours and places that were shown together, or of all others."""
    pairs = [pair for pair in product(COLOURS, POSITIONS) if (pair in SHOWN) == shown]
    return [(sentence(colour, place), colour, place) for colour, place in pairs]


def moving_prompts(shown: bool) -> list[Prompt]:
    """(sentence, colour, place, motion) of the colours and motions that were shown together, or of all others."""
    pairs = [pair for pair in product(COLOURS, MOTIONS) if (pair in MOTIONS_SHOWN) == shown]
    asked = [(*moving_sentence(colour, motion), colour, motion) for colour, motion in pairs]
    return [(text, colour, place, motion) for text, place, colour, motion in asked]


def fidelity(pictures: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> dict[str, float]:
    """Shares of the pictures, or clips, that show the subject, its colour, its place and its motion."""
    right = []
    for picture, (_, *asked) in zip(pictures, prompts, strict=True):
        read = clip_scorer.look if picture.ndim == 4 else scorer.find
        found = read(picture, (*SHAPES, SUBJECT))
        shown = (found.colour, found.position, getattr(found, "motion", None))
        right.append((found.shape == SUBJECT, *(one == wanted for one, wanted in zip(shown, asked, strict=False))))
    return dict(zip(TARGETS, np.mean(right, axis=0).tolist(), strict=False))


@dataclass(frozen=True)
class _Kind:
    """What pictures and clips are asked for, and how sentences without the subject are scored."""

    prompts: Callable[[bool], list[Prompt]]
    sentences: Callable[..., list[tuple]]
    accuracy: Callable[[Sequence[np.ndarray], Sequence[str]], dict[str, float]]


PICTURES = _Kind(subject_prompts, scorer.sentences, scorer.accuracy)
CLIPS = _Kind(
    moving_prompts,
    clip_scorer.sentences,
    lambda clips, texts: clip_scorer.accuracy(clips, [clip_scorer.attributes_of(text) for text in texts]),
)


def report(base: Scored, samples: int, seed: int) -> tuple[list[np.ndarray], int, list[str]]:
    """Print all about the LoRA of `base.settings`; returns drawings, the columns to show them in, and captions.

    samples: sentences about other things; about the subject, each is drawn once for 25 of them.
    """
    kind = CLIPS if base.draws_clips else PICTURES
    drawings, shares, shown = {"base": base, "LoRA": base.with_lora()}, {}, {}
    for which in ("shown", "never shown"):
        prompts = kind.prompts(which == "shown") * max(1, samples // 25)
        texts = [text for text, *_ in prompts]
        for name, drawing in drawings.items():
            shown[name] = drawing.draw(texts, seed)[drawing.best]
            shares[name, which] = fidelity(shown[name], prompts)
            label = f"{name}, colour and {'motion' if base.draws_clips else 'place'} {which}"
            _print_row(label, shares[name, which], heading=len(shares) == 1)
    others = [text for _, text in kind.sentences(samples, SEEN_PAIRS, seed)]
    print()
    for number, (name, drawing) in enumerate(drawings.items()):
        row = kind.accuracy(drawing.draw(others, seed)[drawing.best], others)
        _print_row(f"{name}, sentences without it", row, heading=number == 0)
    wanted = shares["LoRA", "shown"].keys()
    missed = [
        f"{name} ({which})" for which in ("shown", "never shown") for name in wanted
        if shares["LoRA", which][name] < TARGETS[name]
    ]  # fmt: skip
    goal = ", ".join(f"{name} {100 * TARGETS[name]:.0f}" for name in wanted)
    print(f"\ntargets ({goal}): " + (f"missed in {', '.join(missed)}" if missed else "all reached"))
    cells = [picture for pair in zip(shown["base"], shown["LoRA"], strict=True) for picture in pair][:24]
    return cells, 6, [f"{name}: {text}" for text in texts for name in drawings][:24]


def _print_row(label: str, shares: dict[str, float], heading: bool) -> None:
    if heading:
        print(f"{'%':36}" + "".join(f"{name:>10}" for name in shares))
    print(f"{label:36}" + "".join(f"{100 * share:10.1f}" for share in shares.values()))
