"""Samples of a training that draws pictures for prompts, or for the captions of held-out samples."""

from collections.abc import Mapping

import numpy as np

from families.common.family import TEXT_TO_IMAGE
from families.common.next_commands import drawing_commands, first_prompt, size_keys
from families.common.pictures import to_uint8
from families.common.training import DiffusionTraining
from warpcore.core import Sampled
from warpcore.data.buckets import whole_size
from warpcore.data.reader import Batch


class PromptSamples(DiffusionTraining):
    """Draws what `sample_prompts` say, else the captions of held-out samples beside their pictures."""

    def draw(self, prompts: list[str], size: tuple[int, int]) -> Mapping[str, np.ndarray]:
        """Columns of drawings, uint8 (B, H, W, 3) of `size` (H, W), by their name; one where a LoRA is
        drawn beside what it changes."""
        raise NotImplementedError

    @property
    def drawing_task(self) -> str:
        """The task of `families.common.family` that draws with what is trained."""
        return TEXT_TO_IMAGE

    def next_commands(self) -> list[str]:
        size = size_keys(self.config) if self.drawing_task == TEXT_TO_IMAGE else {}  # of clips, runs say it
        return drawing_commands(self.drawing_task, self.config, prompts=first_prompt(self.config), **size)

    @property
    def draws_samples(self) -> bool:
        return not self.config.sample_prompts

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        config = self.config
        if config.sample_prompts:
            prompts, size = config.sample_prompts[: config.sample_count], whole_size(config.image_size)
            return Sampled.rows(prompts, self.draw(prompts, size))
        prompts = held_out.captions[: config.sample_count]
        shown = {} if held_out.images is None else {"picture": to_uint8(held_out.images[: len(prompts)])}
        return Sampled.rows(prompts, shown | self.draw(prompts, held_out.size))
