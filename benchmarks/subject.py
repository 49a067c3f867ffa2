"""How well a LoRA taught the mini cascade a new subject, and what it made the cascade forget.

    python3 benchmarks/subject.py --run runs/quickstart_lora

The base and the LoRA draw the subject by its token, with the colours and places of the training pictures and with
others that they never show together or at all, and sentences of the demo world that have nothing to do with it.
Subject fidelity: the shape is the subject's. Prompt fidelity: colour and place are those asked for. The scorer is that
of `benchmarks/learning.py`, with the subject among the shapes that it knows; the pictures are the previewer's.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import yaml

from benchmarks import learning
from benchmarks.learning import ATTRIBUTES, accuracy, find, sentences
from cascade import build
from cascade.conditions import prompt_conditions
from cascade.config import ModelSettings
from cascade.diffusion import draw_latents, make_diffusion
from cascade.lora import add_tokens, merge_loras, open_loras
from cascade.pictures import to_pictures
from tools.demo_scenes import COLOURS, POSITIONS, SEEN_PAIRS, SHAPES, SUBJECT
from tools.make_demo_subject import SHOWN, sentence
from warpcore.pictures import grid, save_png

SIDE_PX = 128
TARGETS = {"subject": 0.9, "colour": 0.9, "place": 0.9}
"""What drawings of the subject should reach, at colours and places that were shown and at others."""


class Drawing:
    """The networks of the run's base, or with its LoRA."""

    def __init__(self, run: Path, loras: Sequence[str], **sampling):
        of_run = yaml.safe_load((run / "config.yaml").read_text())
        settings = ModelSettings(**{key: of_run[key] for key in ModelSettings.model_fields if of_run[key] is not None})
        self.generator, self.text = build.stage_c(settings).eval(), build.text(settings).float()
        self.previewer = build.previewer(settings).eval()
        opened = open_loras(loras, settings)
        merge_loras(self.generator, opened)
        add_tokens(self.text, opened)
        self.diffusion, self.sampling = make_diffusion(settings.diffusion_target), sampling
        self.side = SIDE_PX // settings.version.compression

    @torch.inference_mode()
    def draw(self, prompts: Sequence[str], seed: int) -> list[np.ndarray]:
        """A picture, uint8 (64, 64, 3), for each prompt."""
        width, cpu = self.generator.clip_img_mapper.in_features, torch.device("cpu")
        latents = draw_latents(
            self.diffusion,
            self.generator,
            prompt_conditions(self.text, prompts, width, cpu),
            prompt_conditions(self.text, [""] * len(prompts), width, cpu),
            (16, self.side, self.side),
            [seed + i for i in range(len(prompts))],
            **self.sampling,
        )
        return list(to_pictures(self.previewer(latents)))


def subject_prompts(shown: bool) -> list[tuple[str, str, str]]:
    """(sentence, colour, place) of the colours and places that were shown together, or of all others."""
    pairs = [pair for pair in product(COLOURS, POSITIONS) if (pair in SHOWN) == shown]
    return [(sentence(colour, place), colour, place) for colour, place in pairs]


def fidelity(pictures: Sequence[np.ndarray], prompts: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """Shares of the pictures that show the subject, its colour and its place."""
    with patch.object(learning, "SHAPES", (*SHAPES, SUBJECT)):  # what the scorer compares outlines with
        found = [find(picture) for picture in pictures]
    asked = [(SUBJECT, colour, place) for _, colour, place in prompts]
    right = [
        (f.shape == shape, f.colour == colour, f.position == place)
        for f, (shape, colour, place) in zip(found, asked, strict=True)
    ]
    return dict(zip(TARGETS, np.mean(right, axis=0).tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the LoRA's training run")
    parser.add_argument("--strength", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=4, help="drawings of each sentence about the subject")
    parser.add_argument("--samples", type=int, default=100, help="sentences of the demo world")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sampler", default="ddim")
    parser.add_argument("--grid", type=Path, help="also write drawings of the subject to this PNG file")
    options = parser.parse_args()
    files = [options.run / f"{name}.safetensors" for name in ("lora_ema", "lora")]
    file = next(file for file in files if file.is_file())
    sampling = {"steps": options.steps, "guidance": options.guidance, "sampler": options.sampler}
    loras = {"base": [], "LoRA": [f"{file}:{options.strength}"]}
    drawings = {name: Drawing(options.run, chosen, **sampling) for name, chosen in loras.items()}
    shares = {}
    print(f"{'%':34}" + "".join(f"{name:>10}" for name in TARGETS))
    for kind, shown in {"shown": True, "never shown": False}.items():
        prompts = subject_prompts(shown) * options.seeds
        for name, drawing in drawings.items():
            texts = [text for text, *_ in prompts]
            pictures = [p for i in range(0, len(texts), 50) for p in drawing.draw(texts[i : i + 50], i)]
            shares[name, kind] = fidelity(pictures, prompts)
            row = "".join(f"{100 * share:10.1f}" for share in shares[name, kind].values())
            print(f"{f'{name}, colour and place {kind}':34}{row}")
            if options.grid is not None and name == "LoRA" and not shown:
                save_png(options.grid, grid(pictures[:28], 7, texts[:28]))
    texts = [text for _, text in sentences(options.samples, SEEN_PAIRS, 0)]
    print(f"\n{'%':34}" + "".join(f"{name:>10}" for name in (*ATTRIBUTES, "all")))
    for name, drawing in drawings.items():
        pictures = [p for i in range(0, len(texts), 50) for p in drawing.draw(texts[i : i + 50], i)]
        row = "".join(f"{100 * share:10.1f}" for share in accuracy(pictures, texts).values())
        print(f"{f'{name}, sentences without it':34}{row}")
    missed = [
        f"{name} ({kind})" for kind in ("shown", "never shown") for name, least in TARGETS.items()
        if shares["LoRA", kind][name] < least
    ]  # fmt: skip
    goal = ", ".join(f"{name} {100 * least:.0f}" for name, least in TARGETS.items())
    print(f"\ntargets ({goal}): " + (f"missed in {', '.join(missed)}" if missed else "all reached"))


if __name__ == "__main__":
    main()
