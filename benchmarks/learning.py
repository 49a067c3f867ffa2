"""How well a trained mini cascade draws what it is told, and what each of its stages loses.

    python3 benchmarks/learning.py --run runs/quickstart_c

Held-out pictures go through Stage A alone, through the whole way that a drawn picture takes (encoder, Stage B, Stage
A) and through the previewer: PSNR and SSIM. Then sentences that the demo set never uses are drawn by the whole
cascade, first with (colour, shape) pairs that it shows, then with pairs that it never shows; true and rebuilt pictures
say how far the scorer can be trusted.

The scorer finds the saturated shapes on the muted background, then compares their outline with each shape's templates
(intersection over union at equal area), their median colour with each colour (in Lab), and the middle of all of them
with each position's.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch

from cascade.diffusion import latent_size
from cascade.inference import DrawingSettings
from cascade.pictures import nearness, to_pictures
from cascade.sampling import Cascade
from tools.demo_scenes import (
    COLOURS,
    POSITIONS,
    SEEN_PAIRS,
    SHAPES,
    UNSEEN_PAIRS,
    Scene,
    captioned_scene,
    describe,
    render,
    shape_mask,
)
from warpcore.config import make_config
from warpcore.pictures import grid, save_png

ATTRIBUTES = ("colour", "position", "shape", "count")
TARGETS = {"colour": 0.9, "position": 0.9, "shape": 0.75}
"""What drawings of unseen sentences with seen pairs should reach after the quickstart."""
LEAST_PSNR = 28.0
"""What Stage A should reach on held-out pictures, in dB."""
_WORKING_SIDE_PX = 256
"""Pictures are scaled until the square root of their area is this, so that thresholds hold for every size."""
_LEAST_CHROMA = 22.0
"""Backgrounds stay below 12 in Lab chroma, every colour of the demo world is above 40."""
_TEMPLATE_PX = 64
_TEMPLATE_BLURS = (4.0, 12.0)
"""Deviations of the blur on a shape of radius 60 px."""


@dataclass(frozen=True)
class Found:
    """What a picture shows; None where nothing stands out of the background."""

    colour: str | None
    position: str | None
    shape: str | None
    count: int


def score(picture: np.ndarray, wanted: dict[str, str | int]) -> dict[str, bool]:
    """Which of the wanted attributes the picture shows.

    `picture` is uint8 RGB (H, W, 3) of any size, `wanted` holds some of "colour", "position", "shape" and "count" as
    `tools.demo_scenes.describe` returns them; other attributes are passed over.
    """
    found = find(picture)
    return {name: getattr(found, name) == value for name, value in wanted.items() if hasattr(found, name)}


def find(picture: np.ndarray) -> Found:
    """Reads a picture, uint8 RGB (H, W, 3)."""
    scale = _WORKING_SIDE_PX / (picture.shape[0] * picture.shape[1]) ** 0.5
    picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    picture = cv2.GaussianBlur(picture, (0, 0), 1.5)
    lab = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    masks = _things(lab)
    if not masks:
        return Found(None, None, None, 0)
    together = np.any(masks, axis=0)
    votes = [_shape(mask) for mask in masks]
    return Found(_colour(lab, together), _position(together), max(votes, key=votes.count), len(masks))


def _things(lab: np.ndarray) -> list[np.ndarray]:
    """Masks (H, W) bool of the shapes: connected, and in chroma nearer to the strongest than to the background."""
    chroma = np.hypot(lab[..., 1], lab[..., 2])
    strongest = np.sort(chroma, axis=None)[-chroma.size // 100 :].mean()
    if strongest < _LEAST_CHROMA:
        return []
    threshold = max(0.5 * (strongest + np.median(chroma)), 0.75 * _LEAST_CHROMA)
    _, labels, statistics, _ = cv2.connectedComponentsWithStats((chroma > threshold).astype(np.uint8), connectivity=4)
    areas = statistics[1:, cv2.CC_STAT_AREA]
    least = max(0.004 * chroma.size, 0.25 * areas.max())
    return [labels == i + 1 for i in np.flatnonzero(areas >= least)]


def _colour(lab: np.ndarray, mask: np.ndarray) -> str:
    inside = cv2.erode(mask.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool)
    mean = np.median(lab[inside if inside.any() else mask], axis=0)
    names = list(COLOURS)
    known = cv2.cvtColor(np.array([list(COLOURS.values())], np.float32) / 255, cv2.COLOR_RGB2LAB)[0]
    return names[int(np.argmin(((known - mean) ** 2 * (0.25, 1, 1)).sum(1)))]


def _position(mask: np.ndarray) -> str:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x = (columns[0] + columns[-1] + 1) / 2 / mask.shape[1]
    y = (rows[0] + rows[-1] + 1) / 2 / mask.shape[0]
    return min(POSITIONS, key=lambda name: (POSITIONS[name][0] - x) ** 2 + (POSITIONS[name][1] - y) ** 2)


def _shape(mask: np.ndarray) -> str:
    outline = _normalised(mask)

    def overlap(shape: str) -> float:
        return max((outline & template).sum() / (outline | template).sum() for template in _templates(shape))

    return max(SHAPES, key=overlap)


@cache
def _templates(shape: str) -> list[np.ndarray]:
    """The outline of a shape, sharp and as a blurred picture shows it."""
    sharp = shape_mask(shape, 256, 256, 128, 128, 60)
    return [_normalised(cv2.GaussianBlur(sharp, (0, 0), blur) > 0.5) for blur in _TEMPLATE_BLURS]


def _normalised(mask: np.ndarray) -> np.ndarray:
    """The mask (H, W) bool moved and scaled: centre of mass in the middle, a sixth of the canvas covered."""
    mask = mask.astype(np.float32)
    moments = cv2.moments(mask)
    x, y = moments["m10"] / moments["m00"], moments["m01"] / moments["m00"]
    scale = (_TEMPLATE_PX**2 / 6 / moments["m00"]) ** 0.5
    middle = (_TEMPLATE_PX - 1) / 2
    move = np.array([[scale, 0, middle - scale * x], [0, scale, middle - scale * y]])
    return cv2.warpAffine(mask, move, (_TEMPLATE_PX, _TEMPLATE_PX), flags=cv2.INTER_LINEAR) > 0.5


def sentences(number: int, pairs: Sequence[tuple[str, str]], seed: int) -> list[tuple[Scene, str]]:
    """Scenes with sentences that the demo set never uses."""
    rng = np.random.default_rng(seed)
    return [captioned_scene(rng, tuple(pairs), held_out=True) for _ in range(number)]


class Drawing:
    """The ways through a mini cascade; without weights of Stage B, only those that need none. Pictures are uint8
    (H, W, 3)."""

    def __init__(self, settings: DrawingSettings, **sampling):
        self.cascade, self.sampling = Cascade(settings), sampling
        self.has_stage_b = settings.stage_b.generator_checkpoint_path is not None

    def draw(
        self, prompts: Sequence[str], seed: int, size: tuple[int, int] = (128, 128)
    ) -> dict[str, list[np.ndarray]]:
        """Pictures of each prompt: `drawn` by the whole cascade, `previewed` by the previewer."""
        seeds = [seed + i for i in range(len(prompts))]
        conditions = self.cascade.read([*prompts, ""])
        given = {name: value[:-1] for name, value in conditions.items()}
        nothing = {name: value[-1:] for name, value in conditions.items()}
        latents = self.cascade.draw_c(given, nothing, size, seeds, **self.sampling)
        pictures = {"previewed": _uint8(self.cascade.preview(latents))}
        if self.has_stage_b:
            pooled = given["clip_text_pooled"], nothing["clip_text_pooled"]
            stage_a = self.cascade.draw_b(latents, *pooled, [size] * len(seeds), seeds)
            pictures["drawn"] = _uint8(self.cascade.decode(stage_a, [size] * len(seeds)))
        return pictures

    def rebuild(self, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> dict[str, list[np.ndarray]]:
        """What each way makes of given pictures."""
        given = [torch.from_numpy(picture).permute(2, 0, 1).float() / 255 for picture in pictures]
        sizes, seeds = [tuple(picture.shape[1:]) for picture in given], list(range(len(given)))
        compression = self.cascade.settings.version.compression
        latents = self.cascade.encode(given, [latent_size(*size, compression) for size in sizes])
        ways = {
            "Stage A": _uint8(self.cascade.rebuild(given)),
            "encoder, previewer": _uint8(self.cascade.preview(latents)),
        }
        if self.has_stage_b:
            pooled = self.cascade.read([*texts, ""])["clip_text_pooled"]
            stage_a = self.cascade.draw_b(latents, pooled[:-1], pooled[-1:], sizes, seeds)
            ways["encoder, B, A"] = _uint8(self.cascade.decode(stage_a, sizes))
        return ways


def _uint8(pictures: Sequence[torch.Tensor]) -> list[np.ndarray]:
    return [to_pictures(picture[None])[0] for picture in pictures]


def distance(made: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """PSNR in dB and SSIM of a picture, enlarged to the true one's size where it is smaller."""
    made = cv2.resize(made, true.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    found = nearness(*(torch.from_numpy(picture).permute(2, 0, 1)[None] / 255 for picture in (made, true)))
    return found["psnr"].item(), found["ssim"].item()


def accuracy(pictures: Sequence[np.ndarray], texts: Sequence[str]) -> dict[str, float]:
    """Share of the pictures that show each attribute of their sentence, and all of them together."""
    results = [score(picture, describe(text)) for picture, text in zip(pictures, texts, strict=True)]
    shares = {name: float(np.mean([result[name] for result in results])) for name in ATTRIBUTES}
    return shares | {"all": float(np.mean([all(result.values()) for result in results]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, nargs="+", required=True, help="folders of training runs, Stage C's first")
    parser.add_argument(
        "--samples", type=int, default=200, help="sentences drawn with seen pairs; half as many unseen"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--no_ema", action="store_true", help="the weights themselves, not their average")
    parser.add_argument("--grid", type=Path, help="also write some drawings to this PNG file")
    options = parser.parse_args()
    settings = make_config(
        DrawingSettings,
        {"run": options.run, "use_ema": not options.no_ema, "batch_size": 50, "stage_b_sampler": "ddim"},
    )
    drawing = Drawing(settings, steps=options.steps, guidance=options.guidance, sampler=options.sampler)
    seen = sentences(options.samples, SEEN_PAIRS, options.seed)
    unseen = sentences(options.samples // 2, sorted(UNSEEN_PAIRS), options.seed + 1)
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

    drawn, drawn_unseen = drawing.draw(texts, options.seed), drawing.draw(others, options.seed + len(texts))
    final = "drawn" if drawing.has_stage_b else "previewed"
    kinds = {f"{way}, pairs seen": (pictures, texts) for way, pictures in drawn.items()}
    kinds[f"{final}, pairs never seen"] = (drawn_unseen[final], others)
    kinds |= {f"rebuilt: {way}": (pictures, texts) for way, pictures in rebuilt.items()}
    kinds["true pictures"] = (true, texts)
    shares = {kind: accuracy(pictures, words) for kind, (pictures, words) in kinds.items()}
    print(f"\n{'%':32}" + "".join(f"{name:>10}" for name in (*ATTRIBUTES, "all")))
    for kind, row in shares.items():
        print(f"{kind:32}" + "".join(f"{100 * value:10.1f}" for value in row.values()))
    if options.grid is not None:
        save_png(options.grid, grid(drawn[final][:36], 6, texts[:36]))

    missed = [name for name, least in TARGETS.items() if shares[f"{final}, pairs seen"][name] < least]
    missed += ["Stage A"] if quality["Stage A"][0] < LEAST_PSNR else []
    goal = ", ".join(f"{name} {100 * least:.0f}" for name, least in TARGETS.items())
    print(f"\ntargets ({goal} for pairs seen; Stage A {LEAST_PSNR:.0f} dB): "
          + (f"missed in {', '.join(missed)}" if missed else "all reached"))  # fmt: skip


if __name__ == "__main__":
    main()
