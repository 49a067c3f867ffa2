"""How well a trained mini cascade draws what it is told, judged by plain image processing.

    python3 benchmarks/learning.py --run runs/quickstart_c

Sentences that the demo set never uses are drawn, first with (colour, shape) pairs that it shows, then with pairs that
it never shows; true pictures and their reconstructions by encoder and previewer say how far the scorer can be trusted.

The scorer finds the saturated shapes on the muted background, then compares their outline with each shape's templates
(intersection over union at equal area), their median colour with each colour (in Lab), and the middle of all of them
with each position's. A previewer's picture of 64 px is enough for it.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml

from cascade import build
from cascade.conditions import prompt_conditions
from cascade.config import ModelSettings
from cascade.diffusion import draw_latents, make_diffusion
from cascade.pictures import to_pictures
from modules.effnet import normalise_images
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
from warpcore.pictures import grid, save_png

ATTRIBUTES = ("colour", "position", "shape", "count")
TARGETS = {"colour": 0.9, "position": 0.9, "shape": 0.75}
"""What drawings of unseen sentences with seen pairs should reach after the quickstart."""
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


class Cascade:
    """The networks of a training run, ready to draw."""

    def __init__(self, run: Path, use_ema: bool, steps: int, guidance: float, sampler: str):
        of_run = yaml.safe_load((run / "config.yaml").read_text())
        settings = {key: of_run[key] for key in ModelSettings.model_fields if of_run.get(key) is not None}
        weights = run / "generator_ema.safetensors"
        if not use_ema or not weights.is_file():
            weights = run / "generator.safetensors"
        settings = ModelSettings(**settings | {"generator_checkpoint_path": weights})
        self.diffusion = make_diffusion(settings.diffusion_target)
        self.generator, self.text = build.stage_c(settings).eval(), build.text(settings).float()
        self.encoder, self.previewer = build.encoder(settings).eval(), build.previewer(settings).eval()
        self.options = {"steps": steps, "guidance": guidance, "sampler": sampler}

    @torch.inference_mode()
    def draw(self, prompts: Sequence[str], seed: int, side_px: int = 128) -> list[np.ndarray]:
        """A picture, uint8 (64, 64, 3), for each prompt."""
        width = self.generator.clip_img_mapper.in_features
        side = side_px // self.encoder.compression
        latents = draw_latents(
            self.diffusion,
            self.generator,
            prompt_conditions(self.text, prompts, width, torch.device("cpu")),
            prompt_conditions(self.text, [""] * len(prompts), width, torch.device("cpu")),
            (16, side, side),
            [seed + i for i in range(len(prompts))],
            **self.options,
        )
        return list(to_pictures(self.previewer(latents)))


@torch.inference_mode()
def reconstruct(encoder: torch.nn.Module, previewer: torch.nn.Module, picture: np.ndarray) -> np.ndarray:
    """What encoder and previewer make of a picture: uint8 (H, W, 3) -> half its size."""
    images = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    return to_pictures(previewer(encoder(normalise_images(images))))[0]


def accuracy(pictures: Sequence[np.ndarray], texts: Sequence[str]) -> dict[str, float]:
    """Share of the pictures that show each attribute of their sentence, and all of them together."""
    results = [score(picture, describe(text)) for picture, text in zip(pictures, texts, strict=True)]
    shares = {name: float(np.mean([result[name] for result in results])) for name in ATTRIBUTES}
    return shares | {"all": float(np.mean([all(result.values()) for result in results]))}


def report(cascade: Cascade, number: int, seed: int, grid_path: Path | None = None) -> dict[str, dict[str, float]]:
    """Accuracy of each attribute by kind of picture; writes a grid of drawings if asked to."""
    seen, unseen = sentences(number, SEEN_PAIRS, seed), sentences(number // 2, sorted(UNSEEN_PAIRS), seed + 1)

    def drawn(cases: list[tuple[Scene, str]]) -> list[np.ndarray]:
        texts = [text for _, text in cases]
        return [picture for i in range(0, len(texts), 50) for picture in cascade.draw(texts[i : i + 50], seed + i)]

    kinds: dict[str, tuple[list, Callable[[list], list[np.ndarray]]]] = {
        "drawn, pairs seen": (seen, drawn),
        "drawn, pairs never seen": (unseen, drawn),
        "reconstructed": (
            seen,
            lambda cases: [reconstruct(cascade.encoder, cascade.previewer, render(scene)) for scene, _ in cases],
        ),
        "true pictures": (seen, lambda cases: [render(scene) for scene, _ in cases]),
    }
    shares = {}
    for kind, (cases, make) in kinds.items():
        pictures, texts = make(cases), [text for _, text in cases]
        shares[kind] = accuracy(pictures, texts)
        if grid_path is not None and make is drawn and cases is seen:
            save_png(grid_path, grid(pictures[:36], 6, texts[:36]))
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a training run")
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
    cascade = Cascade(options.run, not options.no_ema, options.steps, options.guidance, options.sampler)
    shares = report(cascade, options.samples, options.seed, options.grid)
    print(f"{'%':26}" + "".join(f"{name:>10}" for name in (*ATTRIBUTES, "all")))
    for kind, row in shares.items():
        print(f"{kind:26}" + "".join(f"{100 * value:10.1f}" for value in row.values()))
    missed = [name for name, least in TARGETS.items() if shares["drawn, pairs seen"][name] < least]
    goal = ", ".join(f"{name} {100 * least:.0f}" for name, least in TARGETS.items())
    print(f"targets for pairs seen ({goal}): " + (f"missed in {', '.join(missed)}" if missed else "all reached"))


if __name__ == "__main__":
    main()
