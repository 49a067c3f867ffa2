"""How well a LoRA taught the mini cascade a new subject, and what it made the cascade forget.

    python3 benchmarks/learning.py --run runs/quickstart_lora

The base and the LoRA draw the subject by its token, with the colours and places of the training pictures and with
others that they never show together or at all, and sentences of the demo world that have nothing to do with it.
Subject fidelity: the shape is the subject's. Prompt fidelity: colour and place are those asked for. The scorer is that
of `benchmarks/scorer.py`, with the subject among the shapes that it knows.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

from benchmarks.scorer import ATTRIBUTES, accuracy, find, sentences
from families.common.scoring import Scored
from tools.demo_scenes import COLOURS, POSITIONS, SEEN_PAIRS, SHAPES, SUBJECT
from tools.make_demo_subject import SHOWN, sentence

TARGETS = {"subject": 0.8, "colour": 0.9, "place": 0.9}
"""What drawings of the subject should reach, at colours and places that were shown and at others."""


def subject_prompts(shown: bool) -> list[tuple[str, str, str]]:
    """(sentence, colour, place) of the colours and places that were shown together, or of all others."""
    pairs = [pair for pair in product(COLOURS, POSITIONS) if (pair in SHOWN) == shown]
    return [(sentence(colour, place), colour, place) for colour, place in pairs]


def fidelity(pictures: Sequence[np.ndarray], prompts: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """Shares of the pictures that show the subject, its colour and its place."""
    found = [find(picture, (*SHAPES, SUBJECT)) for picture in pictures]
    right = [
        (f.shape == SUBJECT, f.colour == colour, f.position == place)
        for f, (_, colour, place) in zip(found, prompts, strict=True)
    ]
    return dict(zip(TARGETS, np.mean(right, axis=0).tolist(), strict=True))


def report(base: Scored, samples: int, seed: int) -> tuple[list[np.ndarray], int, list[str]]:
    """Print all about the LoRA of `base.settings`; returns drawings, the columns to show them in, and captions.

    samples: sentences about other things; about the subject, each is drawn once for 25 of them.
    """
    drawings, shares, shown = {"base": base, "LoRA": base.with_lora()}, {}, {}
    print(f"{'%':34}" + "".join(f"{name:>10}" for name in TARGETS))
    for kind in ("shown", "never shown"):
        prompts = subject_prompts(kind == "shown") * max(1, samples // 25)
        texts = [text for text, *_ in prompts]
        for name, drawing in drawings.items():
            shown[name] = drawing.draw(texts, seed)[drawing.best]
            shares[name, kind] = fidelity(shown[name], prompts)
            row = "".join(f"{100 * share:10.1f}" for share in shares[name, kind].values())
            print(f"{f'{name}, colour and place {kind}':34}{row}")
    others = [text for _, text in sentences(samples, SEEN_PAIRS, seed)]
    print(f"\n{'%':34}" + "".join(f"{name:>10}" for name in (*ATTRIBUTES, "all")))
    for name, drawing in drawings.items():
        row = "".join(
            f"{100 * share:10.1f}" for share in accuracy(drawing.draw(others, seed)[drawing.best], others).values()
        )
        print(f"{f'{name}, sentences without it':34}{row}")
    missed = [
        f"{name} ({kind})" for kind in ("shown", "never shown") for name, least in TARGETS.items()
        if shares["LoRA", kind][name] < least
    ]  # fmt: skip
    goal = ", ".join(f"{name} {100 * least:.0f}" for name, least in TARGETS.items())
    print(f"\ntargets ({goal}): " + (f"missed in {', '.join(missed)}" if missed else "all reached"))
    cells = [picture for pair in zip(shown["base"], shown["LoRA"], strict=True) for picture in pair][:24]
    return cells, 6, [f"{name}: {text}" for text in texts for name in drawings][:24]
