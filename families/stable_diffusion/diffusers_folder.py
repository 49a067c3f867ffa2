"""Folders that diffusers loads: StableDiffusionPipeline, StableDiffusionXLPipeline, or the U-Net by itself; and
pipelines with T5, which have Python code of their own there."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from families.common.library_files import PREDICTIONS, save_library_folder
from families.common.weight_source import PIPELINE
from families.stable_diffusion.components import BETAS, FLOW_PREDICTION
from families.stable_diffusion.config import SdSettings
from families.stable_diffusion.t5_layers import Projection, T5Texts
from families.stable_diffusion.t5_texts import POOLED_PROJECTION, T5_FOLDERS, TEXT_PROJECTION
from warpcore.errors import UserError
from warpcore.weights import disk_errors

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

CLASSES = {
    "unet": ("diffusers", "UNet2DConditionModel"), "vae": ("diffusers", "AutoencoderKL"),
    **dict.fromkeys(T5_FOLDERS, ("transformers", "T5EncoderModel")),
    **dict.fromkeys((TEXT_PROJECTION, POOLED_PROJECTION), ("pipeline", Projection.__name__)),
}  # fmt: skip
TOKENIZER = ["transformers", "T5Tokenizer"]
"""Library and class of the parts of a pipeline with T5."""


def pipeline(
    networks: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], settings: SdSettings
) -> "DiffusionPipeline":
    """The pipeline of networks and tokenizers, given by diffusers' names (`unet`, `text_encoder_2`, `tokenizer_2`)."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = {**networks, **tokenizers, "scheduler": scheduler(settings)}
    if settings.version.sees_sizes:
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def t5_parts(texts: T5Texts) -> dict[str, nn.Module]:
    """T5 and its projections, by the names that published pipelines have for them."""
    if texts.pooled is None:
        return {"text_encoder": texts.t5.model, TEXT_PROJECTION: texts.text}
    return {"t5_encoder": texts.t5.model, TEXT_PROJECTION: texts.text, POOLED_PROJECTION: texts.pooled}


def save_t5_folder(networks: Mapping[str, nn.Module], tokenizer: Any, settings: SdSettings, folder: Path) -> None:
    """Write a pipeline with T5. diffusers has no class for it: it is loaded by the Python code of a published one, or
    here."""
    tokenizer.model_max_length = settings.text_tokens  # what such pipelines pad texts to
    own = scheduler(settings)
    for name, network in networks.items():
        if name in T5_FOLDERS:  # one tensor again, under both of its names
            network.set_input_embeddings(network.shared)
    for name, part in {**networks, "tokenizer": tokenizer, "scheduler": own}.items():
        save_library_folder(part, folder / name)
    kind = "StableDiffusionXL_T5Pipeline" if settings.version.sees_sizes else "StableDiffusion_T5Pipeline"
    classes = {name: list(CLASSES[name]) for name in networks}
    index = {"_class_name": kind, **classes, "tokenizer": TOKENIZER, "scheduler": ["diffusers", type(own).__name__]}
    with disk_errors(folder):
        (folder / PIPELINE).write_text(f"{json.dumps(index, indent=2)}\n", encoding="utf-8")


def scheduler(settings: SdSettings) -> "SchedulerMixin":
    """The scheduler that a version was published with, PNDM or Euler, with what the network predicts; another where
    that one cannot draw with it.

    Raises:
        UserError: diffusers' pipelines have none for it.
    """
    from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler, UniPCMultistepScheduler

    target, zero_snr = settings.diffusion_target or "epsilon", bool(settings.zero_terminal_snr)
    if target == "rectified_flows":  # FlowMatchEulerDiscreteScheduler has no scale_model_input, which pipelines call
        return UniPCMultistepScheduler(prediction_type=FLOW_PREDICTION, use_flow_sigmas=True)
    if target not in PREDICTIONS:
        raise UserError(f"diffusion_target: diffusers has no scheduler for networks that predict {target}")
    common = {**BETAS, "steps_offset": 1, "prediction_type": PREDICTIONS[target]}
    # From the last timestep, which is pure noise, one has to begin (arXiv:2305.08891, section 3.3).
    spaced = {"timestep_spacing": "trailing" if zero_snr else "leading", "rescale_betas_zero_snr": zero_snr}
    if settings.version.sees_sizes:
        return EulerDiscreteScheduler(**common, **spaced)
    if zero_snr or target == "x0":
        return DDIMScheduler(**common, **spaced, clip_sample=False, set_alpha_to_one=False)
    return PNDMScheduler(**common, skip_prk_steps=True, set_alpha_to_one=False)
