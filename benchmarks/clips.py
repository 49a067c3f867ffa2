"""How well a mini that draws clips draws the motion that it is told.

    python3 benchmarks/learning.py --run runs/quickstart_latte

Where it is told the name of a motion, colour, shape and place are left to the network; where it is told a sentence,
these count too. Directions are the four motions that lead somewhere. True and rebuilt clips say how far the scorer can
be trusted.
"""

import numpy as np

from benchmarks.clip_scorer import ATTRIBUTES, accuracy, attributes_of, sentences
from families.common.scoring import Scored
from tools.demo_clips import MOTIONS, render
from tools.demo_scenes import SEEN_PAIRS

TARGET = 0.9
"""What share of the clips of a direction should go there."""
COLUMNS = ("direction", *ATTRIBUTES, "all")


def report(drawing: Scored, samples: int, seed: int) -> tuple[list[np.ndarray], int, list[str]]:
    """Print all about a model; returns drawn clips, the columns to show them in, and what was asked for.

    samples: drawings, spread over the motions, or sentences that the demo set never uses.
    """
    cases = sentences(samples, SEEN_PAIRS, seed)
    true, texts = [render(scene) for scene, _ in cases], [text for _, text in cases]
    prompts = [MOTIONS[i % len(MOTIONS)] for i in range(samples)] if drawing.draws_classes else texts
    drawn = drawing.draw(prompts, seed)[drawing.best]
    kinds = {drawing.best: (drawn, prompts)}
    kinds |= {f"rebuilt: {way}": (clips, texts) for way, clips in drawing.rebuild(true, texts).items()}
    kinds["true clips"] = (true, texts)
    found = {
        kind: accuracy(clips, [attributes_of(prompt) for prompt in asked]) for kind, (clips, asked) in kinds.items()
    }
    print(f"\n{'%':32}" + "".join(f"{name:>10}" for name in COLUMNS))
    for kind, row in found.items():
        cells = (f"{100 * row[name]:10.1f}" if name in row else f"{'':10}" for name in COLUMNS)
        print(f"{kind:32}" + "".join(cells))
    print("\n".join(drawing.notes(true)))
    reached = found[drawing.best]["direction"] >= TARGET
    print(f"\ntarget (direction {100 * TARGET:.0f}): {'reached' if reached else 'missed'}")
    return drawn[: 4 * len(MOTIONS)], 4, list(prompts[: 4 * len(MOTIONS)])
