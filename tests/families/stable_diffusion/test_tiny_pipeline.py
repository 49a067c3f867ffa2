"""The tiny pipelines that other tests use are such as diffusers opens, and draw what prompts say."""

import diffusers
import pytest
import torch

from tests.families.stable_diffusion.tiny_pipeline import write_sd15, write_sdxl

WRITERS = {"sd15": (write_sd15, "StableDiffusionPipeline"), "sdxl": (write_sdxl, "StableDiffusionXLPipeline")}


@pytest.mark.parametrize("vocabulary", ["letters", "clip"])
@pytest.mark.parametrize("version", WRITERS)
def test_a_tiny_pipeline_draws_as_its_prompt_says(version, vocabulary, tmp_path):
    write, kind = WRITERS[version]
    write(tmp_path, vocabulary)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == kind
    assert len(pipeline.tokenizer) == pipeline.text_encoder.config.vocab_size
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "pt"}
    pictures = [
        pipeline(prompt, **settings, generator=torch.Generator().manual_seed(1)).images for prompt in ("a dog", "cats")
    ]
    assert pictures[0].shape == (1, 3, 64, 64)
    assert 1e-3 < (pictures[0] - pictures[1]).abs().max() < 0.5
