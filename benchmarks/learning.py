"""How well a trained mini of any family draws what it is told, and what its autoencoders lose.

    python3 benchmarks/learning.py --run runs/quickstart_c
    python3 benchmarks/learning.py --run runs/quickstart_lora            # see benchmarks/subject.py
    python3 benchmarks/learning.py --run runs/quickstart_controlnet      # see benchmarks/edges.py
    python3 benchmarks/learning.py --run runs/quickstart_dit             # see benchmarks/classes.py
    python3 benchmarks/learning.py --run runs/quickstart_latte           # see benchmarks/clips.py

Held-out pictures go through the autoencoder alone, and through every other way that a family has: PSNR and SSIM. Then
sentences that the demo set never uses are drawn, first with (colour, shape) pairs that it shows, then with pairs that
it never shows; true and rebuilt pictures say how far the scorer can be trusted.
"""

import warpcore.openmp
import argparse

import numpy as np

from benchmarks import classes, clips, edges, subject
from benchmarks.scorer import ATTRIBUTES, accuracy, distance, sentences
from families.common.family import SCORING, Family
from families.common.scoring import Scored
from families.registry import family_of
from tools.arguments import amount, local_path, positive, seed
from tools.demo_scenes import SEEN_PAIRS, UNSEEN_PAIRS, render
from warpcore.config import make_config
from warpcore.diffusion.samplers import SAMPLERS
from warpcore.errors import UserError, run_script
from warpcore.outputs import check_new
from warpcore.pictures import grid, save_png

TARGETS = {"colour": 0.9, "position": 0.9, "shape": 0.75}
"""What drawings of unseen sentences with seen pairs should reach after the quickstart."""
LEAST_PSNR = 28.0
"""What an autoencoder should reach on held-out pictures, in dB."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--run", type=local_path, nargs="+", required=True, help="folders of training runs; the first says the family"
    )
    parser.add_argument("--samples", type=positive, default=200, help="sentences drawn")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--steps", type=positive, default=20)
    parser.add_argument("--guidance", type=amount, default=4.0)
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim")
    parser.add_argument("--no_ema", action="store_true", help="the weights themselves, not their average")
    parser.add_argument("--grid", type=local_path, help="also write some drawings to this PNG file")
    options = parser.parse_args()
    if options.grid is not None:
        check_new([options.grid], "name a file", overwrite=True)
    kind = scored_by(family_of(options.run[0]))
    settings = make_config(kind.Config, {"run": options.run, "use_ema": not options.no_ema})
    drawing = kind(settings, steps=options.steps, guidance=options.guidance, sampler=options.sampler)
    report = (
        subject.report if settings.lora
        else edges.report if settings.controlnet
        else clips.report if drawing.draws_clips
        else classes.report if drawing.draws_classes
        else report_drawings
    )  # fmt: skip
    cells, columns, captions = report(drawing, options.samples, options.seed)
    if options.grid is not None:
        options.grid.parent.mkdir(parents=True, exist_ok=True)
        save_png(options.grid, grid(cells, columns, captions))


def scored_by(family: Family) -> type[Scored]:
    """What scores the runs of a family.

    Raises:
        UserError: it has nothing that does.
    """
    kind = family.task(SCORING)
    if kind is None:
        raise UserError(f"--run: the family {family.title} has nothing to score its runs with")
    return kind


def report_drawings(drawing: Scored, samples: int, seed: int) -> tuple[list[np.ndarray], int, list[str]]:
    """Print all about a model; returns drawings, the columns to show them in, and what was asked for."""
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
    print("\n".join(drawing.notes(true)))

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
    missed += [drawing.autoencoder] if quality[drawing.autoencoder][0] < LEAST_PSNR else []
    goal = ", ".join(f"{name} {100 * least:.0f}" for name, least in TARGETS.items())
    print(f"\ntargets ({goal} for pairs seen; {drawing.autoencoder} {LEAST_PSNR:.0f} dB): "
          + (f"missed in {', '.join(missed)}" if missed else "all reached"))  # fmt: skip
    return drawn[drawing.best][:36], 6, texts[:36]


if __name__ == "__main__":
    run_script(main)
