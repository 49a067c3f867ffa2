"""Folders that diffusers loads: StableDiffusionPipeline, StableDiffusionXLPipeline, or the U-Net by itself."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from families.common.library_files import PREDICTIONS
from families.stable_diffusion.components import BETAS, FLOW_PREDICTION
from families.stable_diffusion.config import SdSettings
from warpcore.errors import UserError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin


def pipeline(
    networks: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], settings: SdSettings
) -> "DiffusionPipeline":
    """The pipeline of networks and tokenizers, given by diffusers' names (`unet`, `text_encoder_2`, `tokenizer_2`)."""
    from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = {**networks, **tokenizers, "scheduler": scheduler(settings)}
    if settings.version.sees_sizes:
        return StableDiffusionXLPipeline(**parts, force_zeros_for_empty_prompt=True, add_watermarker=False)
    return StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


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
