"""Do diffusers' pipelines draw the pictures that we draw, from a trained mini cascade and the same noise?

    python3 tools/export.py diffusers runs/quickstart_c exported
    python3 benchmarks/pipelines.py --run runs/quickstart_c --exported exported

Both draw with DDIM, 20 steps of Stage C and 10 of Stage B, without guidance rescale, at 128 px.
"""

import argparse
from pathlib import Path

import torch
from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline

from families.cascade.drawing import finish, sketch
from families.cascade.inference import DrawingSettings
from families.cascade.sampling import Cascade
from families.common.scoring import SIDE_PX
from warpcore.config import make_config
from warpcore.random import SampleRandom, stable_hash

PROMPTS = ["a red circle on the left", "two blue stars at the top", "a small green cross in the middle"]
PROMPTS += ["a pink ring at the bottom"]
SEEDS = [1, 2, 3, 4]
GUIDANCE, STAGE_B_GUIDANCE = 4.0, 1.1
SAMPLING = {"steps": 20, "guidance": GUIDANCE, "guidance_rescale": 0, "sampler": "ddim"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a training run of the mini Stage C")
    parser.add_argument("--exported", type=Path, required=True, help="what tools/export.py wrote of it")
    options = parser.parse_args()
    settings = {"run": options.run, "guidance_rescale": 0, "stage_b_guidance": STAGE_B_GUIDANCE, "device": "cpu"}
    cascade = Cascade(make_config(DrawingSettings, settings | {"stage_b_sampler": "ddim"}))
    drawn = sketch(cascade, PROMPTS, SEEDS, (SIDE_PX, SIDE_PX), **SAMPLING)
    ours = torch.stack(finish(cascade, drawn))

    kinds = {"prior": StableCascadePriorPipeline, "decoder": StableCascadeDecoderPipeline}
    prior, decoder = (
        kind.from_pretrained(options.exported / name, dtype=torch.float32) for name, kind in kinds.items()
    )
    latents = prior(
        PROMPTS, height=SIDE_PX, width=SIDE_PX, num_inference_steps=20, guidance_scale=GUIDANCE, output_type="pt",
        latents=SampleRandom(SEEDS).normal("initial noise", *drawn.latents[0].shape),
    ).image_embeddings  # fmt: skip
    noise = SampleRandom([stable_hash(seed, "Stage B") for seed in SEEDS])
    theirs = decoder(
        latents, PROMPTS, num_inference_steps=10, guidance_scale=STAGE_B_GUIDANCE, output_type="pt",
        latents=noise.normal("initial noise", 4, SIDE_PX // 4, SIDE_PX // 4),
    ).images  # fmt: skip
    of_latents = (torch.stack(drawn.latents) - latents).abs().max().item()
    print(f"latents of Stage C: largest difference {of_latents:.1e}, where their deviation is {latents.std():.1f}")
    print(f"pictures in [0, 1]: largest difference {(ours - theirs).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
