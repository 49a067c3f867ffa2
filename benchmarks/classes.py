"""How well a mini that draws classes draws the one that it is told: a colour and a shape of the demo world.

    python3 benchmarks/learning.py --run runs/quickstart_dit

Every class of the demo set is drawn; where its things are, how many and on what is left to the network. A drawing is
right where colour and shape are; true and rebuilt pictures say how far the scorer can be trusted.
"""

from collections.abc import Sequence

import numpy as np

from benchmarks.scorer import score, sentences
from families.common.scoring import Scored
from tools.demo_scenes import SEEN_PAIRS, describe, render

TARGET = 0.9
"""What share of the drawings should show the right class."""
COLUMNS = ("colour", "shape", "class")


def shares(pictures: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, float]:
    """Shares of the pictures that show the colour and the shape of their class, such as "red circle", and both."""
    results = [score(picture, describe(name)) for picture, name in zip(pictures, names, strict=True)]
    right = [(one["colour"], one["shape"], one["colour"] and one["shape"]) for one in results]
    return dict(zip(COLUMNS, np.mean(right, axis=0).tolist(), strict=True))


def report(drawing: Scored, samples: int, seed: int) -> tuple[list[np.ndarray], int, list[str]]:
    """Print all about a model; returns drawings, the columns to show them in, and their classes.

    samples: drawings, spread over the classes of the demo set.
    """
    names = [f"{colour} {shape}" for colour, shape in SEEN_PAIRS]
    names = [names[i % len(names)] for i in range(samples)]
    scenes = [scene for scene, _ in sentences(samples, SEEN_PAIRS, seed)]
    true, of_true = [render(scene) for scene in scenes], [f"{scene.colour} {scene.shape}" for scene in scenes]
    drawn = drawing.draw(names, seed)[drawing.best]
    kinds = {drawing.best: (drawn, names)}
    kinds |= {f"rebuilt: {way}": (pictures, of_true) for way, pictures in drawing.rebuild(true, of_true).items()}
    kinds["true pictures"] = (true, of_true)
    found = {kind: shares(*pair) for kind, pair in kinds.items()}
    print(f"\n{'%':32}" + "".join(f"{name:>10}" for name in COLUMNS))
    for kind, row in found.items():
        print(f"{kind:32}" + "".join(f"{100 * value:10.1f}" for value in row.values()))
    print("\n".join(drawing.notes(true)))
    reached = found[drawing.best]["class"] >= TARGET
    print(f"\ntarget (class {100 * TARGET:.0f}): {'reached' if reached else 'missed'}")
    return drawn[:42], 7, names[:42]
