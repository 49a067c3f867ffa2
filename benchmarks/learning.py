"""How well a trained mini cascade draws what it is told, and what each of its stages loses.

    python3 benchmarks/learning.py --run runs/quickstart_c
    python3 benchmarks/learning.py --run runs/quickstart_lora            # see benchmarks/subject.py
    python3 benchmarks/learning.py --run runs/quickstart_controlnet      # see benchmarks/edges.py

Held-out pictures go through Stage A alone, through the whole way that a drawn picture takes (encoder, Stage B, Stage
A) and through the previewer: PSNR and SSIM. Then sentences that the demo set never uses are drawn by the whole
cascade, first with (colour, shape) pairs that it shows, then with pairs that it never shows; true and rebuilt pictures
say how far the scorer can be trusted.
"""

import warpcore.openmp
import argparse
from pathlib import Path

import numpy as np

from benchmarks import edges, subject
from benchmarks.drawing import Drawing, ScoredSettings
from benchmarks.scorer import ATTRIBUTES, accuracy, distance, sentences
from tools.demo_scenes import SEEN_PAIRS, UNSEEN_PAIRS, render
from warpcore.config import make_config
from warpcore.errors import run_script
from warpcore.pictures import grid, save_png

TARGETS = {"colour": 0.9, "position": 0.9, "shape": 0.75}
"""What drawings of unseen sentences with seen pairs should reach after the quickstart."""
LEAST_PSNR = 28.0
"""What Stage A should reach on held-out pictures, in dB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="folders of training runs, Stage C's first")
    parser.add_argument("--samples", type=int, default=200, help="sentences drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--no_ema", action="store_true", help="the weights themselves, not their average")
    parser.add_argument("--grid", type=Path, help="also write some drawings to this PNG file")
    options = parser.parse_args()
    settings = make_config(
        ScoredSettings,
        {"run": options.run, "use_ema": not options.no_ema, "batch_size": 50, "stage_b_sampler": "ddim"},
    )
    drawing = Drawing(settings, steps=options.steps, guidance=options.guidance, sampler=options.sampler)
    report = subject.report if settings.lora else edges.report if settings.controlnet else report_cascade
    cells, columns, captions = report(drawing, options.samples, options.seed)
    if options.grid is not None:
        save_png(options.grid, grid(cells, columns, captions))


def report_cascade(drawing: Drawing, samples: int, seed: int) -> tuple[list[np.ndarray], int, list[str]]:
    """Print all about the stages; returns drawings, the columns to show them in, and what was asked for."""
    seen = sentences(samples, SEEN_PAIRS, seed)
    unseen = sentences(samples // 2, sorted(UNSEEN_PAIRS), seed + 1)
    true, texts = [render(scene) for scene, _ in seen], [text for _, text in seen]
    others = [text for _, text in unseen]

    rebuilt = drawing.rebuild(true, texts)
    quality = {}
    for way, pictures in rebuilt.items():
        pairs = [distance(made, picture) for made, picture in zip(pictures, true, strict=True)]
        quality[way] = tuple(np.mean(pairs, axis=0))
    print(f"\n{f'{len(true)} held-out pictures':26}{'PSNR dB':>10}{'SSIM':>10}")
    for way, (psnr, ssim) in quality.items():
        print(f"{way:26}{psnr:10.2f}{ssim:10.4f}")
    print(f"they use {100 * drawing.share_of_codes_used(true):.0f} % of Stage A's codes")

    drawn, drawn_unseen = drawing.draw(texts, seed), drawing.draw(others, seed + len(texts))
    kinds = {f"{way}, pairs seen": (pictures, texts) for way, pictures in drawn.items()}
    kinds[f"{drawing.best}, pairs never seen"] = (drawn_unseen[drawing.best], others)
    kinds |= {f"rebuilt: {way}": (pictures, texts) for way, pictures in rebuilt.items()}
    kinds["true pictures"] = (true, texts)
    shares = {kind: accuracy(pictures, words) for kind, (pictures, words) in kinds.items()}
    print(f"\n{'%':32}" + "".join(f"{name:>10}" for name in (*ATTRIBUTES, "all")))
    for kind, row in shares.items():
        print(f"{kind:32}" + "".join(f"{100 * value:10.1f}" for value in row.values()))

    missed = [name for name, least in TARGETS.items() if shares[f"{drawing.best}, pairs seen"][name] < least]
    missed += ["Stage A"] if quality["Stage A"][0] < LEAST_PSNR else []
    goal = ", ".join(f"{name} {100 * least:.0f}" for name, least in TARGETS.items())
    print(f"\ntargets ({goal} for pairs seen; Stage A {LEAST_PSNR:.0f} dB): "
          + (f"missed in {', '.join(missed)}" if missed else "all reached"))  # fmt: skip
    return drawn[drawing.best][:36], 6, texts[:36]


if __name__ == "__main__":
    run_script(main)
