"""How well a ControlNet of the mini cascade follows given edges.

    python3 benchmarks/edges.py --run runs/quickstart_controlnet

Sentences that the demo set never uses are drawn from the same noise without and with the ControlNet, which sees the
edges of their scenes; in a third way, guidance leads towards these edges and not only towards the sentence. The score
is the F1 of the drawing's edges against the given ones, at 128 px; an edge counts as found if there is one within 2 px
on the other side. True pictures, rebuilt from their latents, say how far a perfect ControlNet could come.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks.learning import sentences
from cascade import build
from cascade.conditions import prompt_conditions
from cascade.controlled import Control, ControlledStageC
from cascade.controlnet import load_controlnet
from cascade.diffusion import draw_latents, latent_size, make_diffusion
from cascade.inference import DrawingSettings
from cascade.pictures import to_pictures
from cascade.sampling import Cascade
from modules.filters.canny import CannyFilter
from tools.demo_scenes import SEEN_PAIRS, render
from warpcore.pictures import grid, save_png

SIDE_PX = 128
TOLERANCE_PX = 2
SAMPLING = {"steps": 20, "guidance": 4.0, "sampler": "ddim"}
WAYS = {"without": (0, 0), "with": (1, 1), "with, guided": (1, 0)}
"""How much the control counts, with the prompt and without it. In the last way, guidance leads to the edges too."""


def edges_of(picture: np.ndarray) -> np.ndarray:
    """Where a picture, uint8 (H, W, 3) of any size, has edges at `SIDE_PX`: bool (SIDE_PX, SIDE_PX)."""
    picture = cv2.resize(picture, (SIDE_PX, SIDE_PX), interpolation=cv2.INTER_CUBIC)
    images = torch.from_numpy(picture).permute(2, 0, 1)[None]
    return CannyFilter(resize=None)(images).condition[0, 0].numpy() > 0.5


def agreement(found: np.ndarray, given: np.ndarray, tolerance_px: float = TOLERANCE_PX) -> float:
    """F1 of edges against given ones, bool (H, W) both; one matches that is at most `tolerance_px` from another."""

    def share_near(of: np.ndarray, to: np.ndarray) -> float:
        if not of.any() or not to.any():
            return float(of.any() == to.any())
        distance = cv2.distanceTransform((~to).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return float((distance[of] <= tolerance_px).mean())

    precision, recall = share_near(found, given), share_near(given, found)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


class Contest:
    """Drawings of the same sentences from the same noise, without and with the ControlNet of a training run."""

    def __init__(self, run: Path, number: int, seed: int, use_ema: bool = True):
        of_run = yaml.safe_load((run / "config.yaml").read_text())
        known = DrawingSettings.model_fields
        self.cascade = Cascade(DrawingSettings(**{key: of_run[key] for key in known if of_run.get(key) is not None}))
        averaged = run / "controlnet_ema.safetensors"
        file = averaged if use_ema and averaged.is_file() else run / "controlnet.safetensors"
        self.controlnet, self.filter = load_controlnet(file, self.cascade.settings)
        cases = [case for case in sentences(4 * number, SEEN_PAIRS, seed) if case[0].width == case[0].height][:number]
        self.texts, self.seeds = [text for _, text in cases], [seed + i for i in range(len(cases))]
        self.pictures = [render(scene) for scene, _ in cases]

    def draw(self) -> dict[str, list[Tensor]]:
        """Stage C's latents (16, h, w) of all sentences, for each of `WAYS`."""
        cascade, settings = self.cascade, self.cascade.settings
        size, diffusion, version = (SIDE_PX, SIDE_PX), make_diffusion(settings.diffusion_target), settings.version
        with cascade.holding("encoder", build.encoder) as encoder, torch.inference_mode():
            images = torch.from_numpy(np.stack(self.pictures)).permute(0, 3, 1, 2)
            condition = self.filter.to(cascade.device, encoder)(images).condition.to(cascade.device, cascade.dtype)
            residuals = self.controlnet.to(cascade.device, cascade.dtype).eval()(condition)
        with cascade.holding("text tower", build.text) as tower:
            width = version.stage_c["c_clip_img"]
            prompts = self.texts, [""] * len(self.texts)
            sides = [prompt_conditions(tower, texts, width, cascade.device) for texts in prompts]
        shape = (16, *latent_size(*size, version.compression, version.patch_size))
        with cascade.holding("Stage C", build.stage_c) as generator:
            network, latents = ControlledStageC(generator, [Control(residuals)], diffusion), {}
            for way, control in WAYS.items():
                given, nothing = (
                    side | {"control": torch.full((1,), float(one), device=cascade.device)}
                    for side, one in zip(sides, control, strict=True)
                )
                latents[way] = list(draw_latents(diffusion, network, given, nothing, shape, self.seeds, **SAMPLING))
        return latents

    def rebuild(self) -> list[Tensor]:
        """The latents of the scenes' own pictures."""
        pictures = [torch.from_numpy(picture).permute(2, 0, 1) / 255 for picture in self.pictures]
        size = latent_size(SIDE_PX, SIDE_PX, self.cascade.settings.version.compression)
        return self.cascade.encode(pictures, [size] * len(pictures))

    def show(self, latents: Sequence[Tensor]) -> list[np.ndarray]:
        """Pictures, uint8 (64, 64, 3), by the previewer."""
        return list(to_pictures(torch.stack(self.cascade.preview(latents))))

    def score(self, pictures: Sequence[np.ndarray]) -> float:
        """The mean agreement of pictures with the edges of their scenes."""
        pairs = zip(pictures, self.pictures, strict=True)
        return float(np.mean([agreement(edges_of(picture), edges_of(true)) for picture, true in pairs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a ControlNet's training run")
    parser.add_argument("--samples", type=int, default=100, help="sentences drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_ema", action="store_true", help="the weights themselves, not their average")
    parser.add_argument("--grid", type=Path, help="also write some pictures, conditions and drawings to this PNG file")
    options = parser.parse_args()
    contest = Contest(options.run, options.samples, options.seed, not options.no_ema)
    shown = {way: contest.show(latents) for way, latents in contest.draw().items()}
    shown["rebuilt"] = contest.show(contest.rebuild())
    for way, pictures in shown.items():
        print(f"{way:14}{100 * contest.score(pictures):6.1f} % F1 of edges within {TOLERANCE_PX} px")
    if options.grid:
        conditions = [
            np.repeat(edges_of(picture)[..., None] * np.uint8(255), 3, axis=2) for picture in contest.pictures
        ]
        columns = {"picture": contest.pictures, "condition": conditions}
        for way in WAYS:
            columns[way] = [cv2.resize(picture, (SIDE_PX, SIDE_PX)) for picture in shown[way]]
        rows = range(min(6, len(contest.texts)))
        cells = [pictures[row] for row in rows for pictures in columns.values()]
        captions = [contest.texts[row] if name == "picture" else name for row in rows for name in columns]
        save_png(options.grid, grid(cells, len(columns), captions))


if __name__ == "__main__":
    main()
