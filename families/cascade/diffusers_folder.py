"""Folders that diffusers loads: StableCascadePriorPipeline (Stage C) and StableCascadeDecoderPipeline (Stage B and A).

    TARGET/prior      prior (Stage C), text encoder, tokenizer, scheduler
    TARGET/decoder    decoder (Stage B), vqgan (Stage A), text encoder, tokenizer, scheduler

Weights keep every bit on the way there and back. diffusers' own way to draw Stable Cascade knows networks that predict
noise; others, and on request those too, get its DDIM scheduler with the noise levels of our own process, whose steps
are those of our `ddim` sampler.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMWuerstchenScheduler,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
)
from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers
from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel
from torch import Tensor, nn

from families.cascade import build
from families.cascade.diffusion import make_diffusion
from families.cascade.inference import CascadeSettings
from families.common.library_files import PREDICTIONS, read_tensors, save_library_folder
from families.common.transformers_text import text_encoder, text_tower, tokenizer
from families.common.weight_files import TARGET_KEY
from families.common.weights import read_weights
from modules.stage_a import StageA
from modules.stage_b import StageB
from modules.stage_c import StageC
from warpcore.errors import UserError
from warpcore.files import why_no_file
from warpcore.safe_json import read_object
from warpcore.text import shortened
from warpcore.weights import write_weights

Read = tuple[dict[str, Tensor], dict[str, str]]
"""The tensors of a network in our names, and what its file says of itself."""
TIMES = 1000
"""Steps of the table of noise levels in diffusers' schedulers."""
BLOCKS = {"C": "SDCascadeResBlock", "T": "SDCascadeTimestepBlock", "A": "SDCascadeAttnBlock"}
UNET_NAMES = {
    "c_in": "in_channels",
    "c_out": "out_channels",
    "c_r": "timestep_ratio_embedding_dim",
    "patch_size": "patch_size",
    "c_cond": "conditioning_dim",
    "c_hidden": "block_out_channels",
    "nhead": "num_attention_heads",
    "c_clip_seq": "clip_seq",
    "kernel_size": "kernel_size",
    "dropout": "dropout",
    "self_attn": "self_attn",
    "t_conds": "timestep_conditioning_type",
    "switch_level": "switch_level",
    "c_clip_text": "clip_text_in_channels",
    "c_clip_text_pooled": "clip_text_pooled_in_channels",
    "c_clip": "clip_text_pooled_in_channels",
    "c_clip_img": "clip_image_in_channels",
    "c_effnet": "effnet_in_channels",
    "c_pixels": "pixel_mapper_in_channels",
}
STAGE_A_NAMES = {
    "levels": "levels",
    "bottleneck_blocks": "bottleneck_blocks",
    "c_hidden": "embed_dim",
    "c_latent": "latent_channels",
    "codebook_size": "num_vq_embeddings",
    "scale_factor": "scale_factor",
}


def write_folder(settings: CascadeSettings, target: Path, ddim: bool = False) -> list[str]:
    """Write a cascade to `target`; without weights of Stage B, only the prior.

    ddim: diffusers' DDIM scheduler also for a network that predicts noise. Returns the names of the folders written.

    Raises:
        UserError: weights are missing, or something diffusers does not know.
    """
    for stage in (settings, settings.stage_b):
        if stage.diffusion_target not in PREDICTIONS:
            raise UserError(
                f"diffusion_target: diffusers cannot draw Stable Cascade with a network that predicts "
                f"{stage.diffusion_target}; train one with {', '.join(PREDICTIONS)}"
            )
    if settings.generator_checkpoint_path is None:
        raise UserError(
            "generator_checkpoint_path: there are no weights of Stage C to write; give them, or a run's folder"
        )
    tower = build.text(settings)
    text = {"text_encoder": text_encoder(tower), "tokenizer": tokenizer(tower)}
    pipelines = {"prior": _prior(settings, text, ddim)}
    if settings.stage_b.generator_checkpoint_path is not None:
        pipelines["decoder"] = _decoder(settings, text, ddim)
    for name, pipeline in pipelines.items():
        save_library_folder(pipeline, target / name)
    return list(pipelines)


def _prior(settings: CascadeSettings, text: dict, ddim: bool) -> StableCascadePriorPipeline:
    version, path = settings.version, settings.generator_checkpoint_path
    return StableCascadePriorPipeline(
        prior=_unet(StageC, version.stage_c, path, "generator_checkpoint_path"),
        scheduler=_scheduler(settings.diffusion_target, ddim),
        resolution_multiple=float(version.compression),
        **text,
    )


def _decoder(settings: CascadeSettings, text: dict, ddim: bool) -> StableCascadeDecoderPipeline:
    stage_b, vqgan = settings.stage_b, _paella(settings)
    path = stage_b.generator_checkpoint_path
    pipeline = StableCascadeDecoderPipeline(
        decoder=_unet(StageB, stage_b.version.stage_b, path, "stage_b_checkpoint_path"),
        vqgan=vqgan,
        scheduler=_scheduler(stage_b.diffusion_target, ddim),
        latent_dim_scale=settings.version.compression / 2**vqgan.config.levels,
        **text,
    )
    if pipeline.config["vqgan"][0] == "diffusers":  # where recent versions say it is, and do not find it
        pipeline.register_to_config(vqgan=(PaellaVQModel.__module__, PaellaVQModel.__name__))
    return pipeline


def read_folder(source: Path, target: Path) -> list[Path]:
    """Write the networks of diffusers' folders as our files: stage_c, stage_b, stage_a, text_tower (.safetensors).

    `source` holds pipelines in `prior` and `decoder`, or is one of them.

    Raises:
        UserError: there is no such pipeline, or one with networks of another kind.
    """
    places = (source / "prior", source / "decoder", source)
    pipelines = [folder for folder in places if (folder / "model_index.json").is_file()]
    if not pipelines:
        raise UserError(f"{source} holds no pipeline of diffusers (model_index.json), nor do prior and decoder in it")
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for pipeline in pipelines:
        for component, (name, read) in COMPONENTS.items():
            file = target / f"{name}.safetensors"
            if (pipeline / component).is_dir() and file not in written:
                tensors, about = _read(pipeline / component, read)
                write_weights(file, tensors, {"format": "pt"} | about)
                written.append(file)
    return written


def _read(folder: Path, read: Callable[[Path], Read]) -> Read:
    """What `read` makes of a network's folder. Raises UserError."""
    try:
        return read(folder)
    except UserError:
        raise
    except (LookupError, RuntimeError, TypeError, ValueError) as error:  # of tensors that are not there, or not alike
        raise UserError(
            f"{folder} holds another network than Stable Cascade's: {type(error).__name__}: {shortened(str(error))}"
        ) from error


def _read_prior(folder: Path) -> Read:
    return _official_unet(read_tensors(folder, "SOURCE")), _target(folder.with_name("scheduler"))


def _read_decoder(folder: Path) -> Read:
    official = _official_unet(read_tensors(folder, "SOURCE"))
    renamed = {name.replace("clip_txt_pooled_mapper", "clip_mapper"): official[name] for name in official}
    return renamed, _target(folder.with_name("scheduler"))


def _read_vqgan(folder: Path) -> Read:
    state = read_tensors(folder, "SOURCE")
    return {name.replace("vquantizer.embedding", "vquantizer.codebook"): state[name] for name in state}, {}


def _read_text_encoder(folder: Path) -> Read:
    tower = text_tower(folder, folder.with_name("tokenizer"), read_tensors(folder, "SOURCE"))
    return tower.weights_to_save(), tower.metadata_to_save()


COMPONENTS = {
    "prior": ("stage_c", _read_prior),
    "decoder": ("stage_b", _read_decoder),
    "vqgan": ("stage_a", _read_vqgan),
    "text_encoder": ("text_tower", _read_text_encoder),
}
"""A component's folder, the name of our file, and what reads it."""


def _unet(network: type[nn.Module], arguments: Mapping[str, Any], path: Path, key: str) -> StableCascadeUNet:
    state = convert_stable_cascade_unet_single_file_to_diffusers(read_weights(path, key))
    with torch.device("meta"):
        unet = StableCascadeUNet(**unet_config(network, arguments))
    return _filled(unet, state, path, key)


def unet_config(network: type[nn.Module], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """diffusers' arguments for a network of ours with these arguments."""
    bound = inspect.signature(network).bind(**arguments)
    bound.apply_defaults()
    ours = bound.arguments
    levels = len(ours["c_hidden"])
    config = {theirs: ours[name] for name, theirs in UNET_NAMES.items() if name in ours}
    if network is StageC:
        config["switch_level"] = tuple(ours["switch_level"] or [False] * (levels - 1))
    unknown = set("".join(ours["level_config"] or ["CTA"])) - BLOCKS.keys()
    if unknown:
        raise UserError(f"level_config: diffusers does not know the blocks {', '.join(sorted(unknown))}")
    repeat = ours["block_repeat"] or [[1] * levels] * 2
    return config | {
        "block_types_per_layer": tuple(
            tuple(BLOCKS[kind] for kind in kinds) for kinds in ours["level_config"] or ["CTA"] * levels
        ),
        "down_num_layers_per_block": tuple(ours["blocks"][0]),
        "up_num_layers_per_block": tuple(ours["blocks"][1]),
        "down_blocks_repeat_mappers": tuple(repeat[0]),
        "up_blocks_repeat_mappers": tuple(repeat[1]),
    }


def _official_unet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' weights with attention under its official names."""
    official = {}
    for name, tensor in state.items():
        if ".to_q." in name:
            parts = [tensor, *(state[name.replace(".to_q.", f".to_{part}.")] for part in "kv")]
            official[name.replace(".to_q.", ".attn.in_proj_")] = torch.cat(parts)
        elif ".to_k." not in name and ".to_v." not in name:
            official[name.replace(".to_out.0.", ".attn.out_proj.")] = tensor
    return official


def _paella(settings: CascadeSettings) -> PaellaVQModel:
    path = build.stage_a_file(settings)
    state = read_weights(path, "stage_a_checkpoint_path")
    bound = inspect.signature(StageA).bind(**settings.version.stage_a)
    bound.apply_defaults()
    with torch.device("meta"):
        vqgan = PaellaVQModel(**{theirs: bound.arguments[ours] for ours, theirs in STAGE_A_NAMES.items()})
    renamed = {name.replace("vquantizer.codebook", "vquantizer.embedding"): state[name] for name in state}
    return _filled(vqgan, renamed, path, "stage_a_checkpoint_path")


def _filled(network: nn.Module, state: Mapping[str, Tensor], path: Path, key: str) -> nn.Module:
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(
            f"{key}: {path} was made for another network. Check model_version and the file. {error}"
        ) from error
    return network.eval()


def _scheduler(target: str, ddim: bool) -> DDPMWuerstchenScheduler | DDIMScheduler:
    if target == "epsilon" and not ddim:
        return DDPMWuerstchenScheduler()
    # Betas such that after i + 1 of the steps the signal is what our schedule says it is at t = (i + 1) / TIMES.
    times = torch.linspace(0, 1, TIMES + 1, dtype=torch.float64)[1:]
    signal = make_diffusion(target).schedule(times).sigmoid()
    betas = 1 - signal / torch.cat([torch.ones(1), signal[:-1]])
    return DDIMScheduler(
        num_train_timesteps=TIMES,
        trained_betas=betas.tolist(),
        prediction_type=PREDICTIONS[target],
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,  # the last step gives the clean signal, as ours does
    )


def _target(scheduler: Path) -> dict[str, str]:
    """What the network beside a scheduler predicts."""
    file = scheduler / "scheduler_config.json"
    if problem := why_no_file(file):
        raise UserError(f"{file} {problem}: it says what the network beside it predicts")
    prediction = read_object(file, str(file)).get("prediction_type", "epsilon")
    found = [ours for ours, theirs in PREDICTIONS.items() if theirs == prediction]
    if not found:
        said, known = shortened(str(prediction)), ", ".join(PREDICTIONS.values())
        raise UserError(f"{scheduler}: prediction_type is {said}, not one of {known}")
    return {TARGET_KEY: found[0]}
