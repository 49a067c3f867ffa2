"""Train a ControlNet: Stage C, frozen, learns to follow edges, poses, a picture to complete, ...

python3 train/train_c_controlnet.py configs/training/quickstart_controlnet.yaml
torchrun --nproc-per-node 8 train/train_c_controlnet.py configs/training/controlnet_c_3b_canny.yaml
"""

import warpcore.openmp
from contextlib import nullcontext
from functools import partial
from typing import Self

import numpy as np
import torch
from pydantic import model_validator
from torch import Tensor, nn

from families.cascade.config import StageCConfig
from families.cascade.controlnet import (
    ControlNetSettings,
    check_side,
    file_metadata,
    filter_fields,
    make_controlnet,
    make_filter,
)
from families.common.frozen_base import FrozenBase, FrozenBaseKeys
from families.common.pictures import to_pictures, to_uint8
from train.train_c import TrainStageC
from warpcore.core import Losses, Sampled
from warpcore.data.buckets import Buckets
from warpcore.data.reader import Batch
from warpcore.errors import UserError
from warpcore.keys import Weights
from warpcore.random import SampleRandom


class ControlNetConfig(ControlNetSettings, FrozenBaseKeys, StageCConfig):
    controlnet_checkpoint_path: Weights | None = None
    """Weights to start from; without it, a new adapter, whose `effnet` starts as that of the encoder."""

    sample_guides_control: bool = False
    """In the pictures drawn at every save, let guidance lead towards the condition as well, not only the prompt."""

    @model_validator(mode="after")
    def _a_generator_to_control(self) -> Self:
        if self.generator_checkpoint_path is None:
            raise ValueError("a ControlNet learns to steer a trained Stage C: give generator_checkpoint_path")
        return self


class TrainControlNet(FrozenBase, TrainStageC):
    Config = ControlNetConfig
    trainable = {"controlnet": {}}
    start_files = ("generator_checkpoint_path", "controlnet_checkpoint_path")
    draws_samples = True  # for their pictures
    without: np.ndarray | None = None  # drawings without the ControlNet, which stay the same

    def build(self) -> dict[str, nn.Module]:
        config, networks = self.config, super().build()
        self.filter = make_filter(config).to(self.device, networks["encoder"])
        check_side(
            self.filter, Buckets.for_image_size(config.image_size, config.multi_aspect_ratio, self.bucket_factor).sizes
        )
        controlnet = make_controlnet(
            config, config, self.filter, networks["generator"].residual_widths, config.controlnet_checkpoint_path
        )
        if config.controlnet_checkpoint_path is None:
            controlnet.start_from_encoder(networks["encoder"].state_dict())
        # Gradients pass through the frozen blocks above the first controlled one, whose activations take most memory.
        networks["generator"].set_activation_checkpointing(config.activation_checkpointing)
        return networks | {"controlnet": controlnet}

    def next_commands(self) -> list[str]:
        return [f"{command} control_image=PICTURE" for command in super().next_commands()]

    def check_cacheable(self) -> None:
        raise UserError("a ControlNet's condition is made of pictures again in each epoch: a cache has none")

    def extra_fields(self) -> dict:
        return super().extra_fields() | filter_fields(self.filter)

    def computed_in_workers(self) -> dict:
        return {} if self.filter.on_device else {type(self.filter).__name__: self.filter.of_batch}

    def condition(self, batch: Batch) -> Tensor:
        """What the filter makes of a batch (B, C, h, w): made by the workers, or now if it needs the device."""
        name = type(self.filter).__name__
        if not self.filter.on_device:
            return batch.extra[name]
        shown = (self.update + 1) % self.config.log_every == 0  # the clock waits for the device
        with batch.timed(name, self.device.type, self.device) if shown else nullcontext():
            return self.filter.of_batch(batch)

    def shown_beside(self, batch: Batch) -> dict[str, Tensor]:
        return {} if self.filter.on_device else {"condition": self.filter.filter_batch(batch).picture}

    def encode(self, batch: Batch, random: SampleRandom) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        return *super().encode(batch, random), self.condition(batch)

    def loss(self, inputs: tuple[Tensor, dict[str, Tensor], Tensor], random: SampleRandom) -> Losses:
        latents, conditions, control = inputs
        conditions["cnet"] = self.networks["controlnet"](control)
        return self.denoising_loss(latents, random, partial(self.networks["generator"], **conditions))

    def file_metadata(self) -> dict[str, str]:
        return super().file_metadata() | file_metadata(self.config)

    def sample(self, held_out: Batch) -> list[Sampled]:
        """Held-out pictures, their conditions, and drawings without and with the ControlNet, from the same noise."""
        count = min(self.config.sample_count, len(held_out.keys))
        prompts = (self.config.sample_prompts or held_out.captions)[:count]
        made = self.filter.filter_batch(held_out, len(prompts))
        if self.without is None:
            self.without = self.draw(prompts, held_out.size)["sample"]
        cnet = self.networks["controlnet"](made.condition.to(self.device))
        uncontrolled = [None if residual is None else torch.zeros_like(residual) for residual in cnet]
        nothing = uncontrolled if self.config.sample_guides_control else cnet
        columns = {
            "picture": to_uint8(held_out.images[: len(prompts)]),
            "condition": to_pictures(made.picture),
            "without": self.without,
        }
        return Sampled.rows(prompts, columns | self.draw(prompts, held_out.size, cnet=(cnet, nothing)))


if __name__ == "__main__":
    TrainControlNet.main()
