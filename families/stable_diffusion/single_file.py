"""Checkpoints in one file, as A1111, Forge and ComfyUI use them: U-Net, autoencoder and text encoders together.

    model.diffusion_model.               unet
    first_stage_model.                   vae
    cond_stage_model.transformer.        text_encoder of Stable Diffusion 1.x
    conditioner.embedders.0.transformer. text_encoder of SDXL
    conditioner.embedders.1.model.       text_encoder_2 of SDXL, in open_clip's names

Files with the U-Net or the autoencoder alone, with these names or without the prefix, are read too. So are `.ckpt`
files that hold nothing but tensors: code in them is never run.
"""

import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor

from families.common.weight_files import TARGET_KEY
from families.common.weights import existing_file
from families.stable_diffusion.original_names import COMPONENTS, NOT_READ, library_tensors, original_tensors
from modules.pickled_weights import read_pickled_tensors
from modules.safetensors_files import open_weights
from warpcore.errors import UserError

logger = logging.getLogger(__name__)

Version = Literal["sd15", "sdxl"]
PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "cond_stage_model.transformer.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.1.model.": "text_encoder_2",
}
"""What names begin with, and the component that they are of."""
UNET_TENSOR, VAE_ATTENTION = "input_blocks.0.0.weight", "decoder.mid.attn_1.q.weight"
"""Tensors that a U-Net or an autoencoder has under the names of single files, and not under diffusers'."""
SUPPORTED = "Stable Diffusion 1.x (sd15) and SDXL (sdxl) for text to image"
CONFIG_KEY = "{}_config"
"""Where the metadata of our own files say how a component is built, by its name: JSON of the library's config."""
ZERO_SNR_KEY = "zero_terminal_snr"
"""Where they say whether their U-Net was trained to pure noise."""
V_PREDICTION, ZERO_TERMINAL_SNR = "v_pred", "ztsnr"
"""Empty tensors that mark SDXL networks that predict v, and were trained to pure noise, as ComfyUI reads them."""

_SCHEDULE = re.compile(
    r"betas|alphas_cumprod(_prev)?|(sqrt_)?(one_minus_|recip_|recipm1_|log_one_minus_)*alphas_cumprod"
    r"|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar|scale_factor|denoiser\.sigmas"
)
"""Buffers of the noise schedule, which the config gives."""
_AVERAGE = "model_ema."
_OTHERS = {
    r"lora_(unet|te\d?)_|.+\.(lora_(up|down|A|B)|lora\.(up|down)|hada_w\w+|lokr_w\w+)(\.|$)": "a LoRA",
    r"(control_model\.)?input_hint_block\.|controlnet_cond_embedding\.": "a ControlNet",
    r"string_to_param|emb_params$|clip_[lg]$": "an embedding (textual inversion)",
    r"(model\.diffusion_model\.)?joint_blocks\.": "Stable Diffusion 3",
    r"(model\.diffusion_model\.)?double_blocks\.": "FLUX",
    r"(model\.diffusion_model\.)?clip_txt_mapper\.|effnet_mapper\.": "Stable Cascade",
    r"vquantizer\.|(down|up)_blocks\.\d+\.(channelwise|depthwise)\.": "Stage A of Stable Cascade",
    r"cond_stage_model\.model\.": "Stable Diffusion 2.x",
    r"conditioner\.embedders\.0\.model\.": "SDXL's refiner",
    r"edm_mean$|edm_vpred\.": "SDXL with EDM's noise levels (Playground 2.5, CosXL)",
    r"(model\.diffusion_model\.)?(input_blocks\.\d+\.\d\.time_stack|.*motion_modules)\.": "a model of video",
    r"down_blocks\.\d+\.|mid_block\.": "a U-Net in diffusers' names",
    r"(encoder|decoder)\.mid_block\.": "an autoencoder in diffusers' names",
    r"text_model\.|embeddings\.token_embedding|token_embedding\.": "a text encoder by itself",
    r"encoder\.block\.\d+\.layer\.0\.SelfAttention": "a T5 text encoder",
}
"""What else files may be, by the beginning of a tensor's name; the first that fits is named."""
_EXTRA_CHANNELS = {5: "a depth model", 7: "an upscaler", 8: "InstructPix2Pix", 9: "an inpainting model"}
"""What U-Nets that see more than the noised latents are, by their input channels."""


@dataclass(frozen=True)
class SingleFile:
    """What a single file holds, by its header."""

    version: Version | None
    """None where there is no U-Net: autoencoders of both are alike."""
    components: Mapping[str, Mapping[str, str]]
    """Of each component that is there: names without its prefix, and the whole names."""
    diffusion_target: str | None = None
    """What the U-Net predicts, where the file says so: `epsilon` or `v`."""
    zero_terminal_snr: bool = False
    """Whether the file says that it was trained to pure noise (arXiv:2305.08891)."""
    ignored: Collection[str] = ()
    """Tensors that are no part of these networks."""
    metadata: Mapping[str, str] = field(default_factory=dict)


def look_into(path: Path, key: str) -> SingleFile:
    """What a single file holds; only its header is read.

    Args:
        key: the config key that named the path, which an error names.

    Raises:
        UserError: the file is missing, unreadable, or of another architecture.
    """
    return _contents(_open(path, key), path, key)


def read_single_file(path: Path, key: str, components: Collection[str] = COMPONENTS) -> dict[str, dict[str, Tensor]]:
    """The tensors of a single file by component, in the names of diffusers' and transformers' own networks.

    They are read one by one, and only those of `components`; a component that the file does not hold is left out.

    Args:
        key: the config key that named the path, which an error names.

    Raises:
        UserError: the file is missing, unreadable, or of another architecture.
    """
    opened = _open(path, key)
    contents = _contents(opened, path, key)
    _report(contents, path, key)
    found = {}
    for component in (one for one in COMPONENTS if one in components and one in contents.components):
        names = contents.components[component]

        def read(name: str, names: Mapping[str, str] = names) -> Tensor:
            return opened.read(names[name])

        try:
            found[component] = dict(library_tensors(component, names, read))
        except (ValueError, SafetensorError, RuntimeError) as error:
            raise UserError(f"{key}: {path} cannot be read as {component} of {SUPPORTED}: {error}") from None
    return found


def single_file_tensors(
    parts: Mapping[str, Mapping[str, Tensor]],
    version: Version,
    target: str = "epsilon",
    zero_terminal_snr: bool = False,
) -> dict[str, Tensor]:
    """The tensors of a single file: the inverse of `read_single_file`.

    Args:
        parts: tensors of each component, in the libraries' names.
        version: the layout; of SDXL marks are added that say `target` v and zero terminal SNR.
    """
    prefixes = {component: prefix for prefix, component in PREFIXES.items()}
    if version == "sd15":
        prefixes["text_encoder"] = "cond_stage_model.transformer."
    tensors = {
        prefixes[component] + name: tensor
        for component, own in parts.items()
        for name, tensor in original_tensors(component, own).items()
    }
    marked = {V_PREDICTION: target == "v", ZERO_TERMINAL_SNR: target == "v" and zero_terminal_snr}
    return tensors | {name: torch.zeros(0) for name, holds in marked.items() if holds and version == "sdxl"}


def is_single_file(names: Collection[str]) -> bool:
    """Whether tensors have the names of single files, whatever architecture they are of."""
    return any(name in (UNET_TENSOR, VAE_ATTENTION) or name.startswith(tuple(PREFIXES)) for name in names)


# ---------------------------------------------------------------- what a file is


def _contents(opened: "_Opened", path: Path, key: str) -> SingleFile:
    components, ignored = _components(opened.names)
    unet = components.get("unet", {})
    problem = _other_architecture(opened, components)
    if problem is not None:
        raise UserError(f"{key}: {path} looks like {problem}; supported are {SUPPORTED}")
    version = ("sdxl" if "label_emb.0.0.weight" in unet else "sd15") if unet else None
    zero_snr = ZERO_TERMINAL_SNR in opened.names or opened.metadata.get(ZERO_SNR_KEY) == "true"
    return SingleFile(version, components, _target(opened), zero_snr, ignored, opened.metadata)


def _components(names: Collection[str]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The components of a file, and its other tensors."""
    components: dict[str, dict[str, str]] = {}
    ignored = []
    alone = None
    if not any(name.startswith(tuple(PREFIXES)) for name in names):
        alone = "unet" if UNET_TENSOR in names else "vae" if VAE_ATTENTION in names else None
    for name in names:
        prefix = "" if alone else next((prefix for prefix in PREFIXES if name.startswith(prefix)), None)
        if prefix is None:
            ignored.append(name)
        else:
            components.setdefault(alone or PREFIXES[prefix], {})[name.removeprefix(prefix)] = name
    return {component: components[component] for component in COMPONENTS if component in components}, ignored


def _other_architecture(opened: "_Opened", components: Mapping[str, Mapping[str, str]]) -> str | None:
    """What a file of another architecture looks like; None for those that are supported."""
    for pattern, what in _OTHERS.items():
        if any(re.match(pattern, name) for name in opened.names):
            return what
    if not components.keys() & {"unet", "vae"}:
        some = ", ".join(sorted(opened.names)[:3]) or "no tensors at all"
        return f"nothing that is known here (it holds {some})"
    unet = components.get("unet")
    if unet is None:
        return None
    if UNET_TENSOR not in unet or "out.2.weight" not in unet:
        return f"no whole U-Net (it has no {UNET_TENSOR} or no out.2.weight)"
    seen, predicted = opened.shape(unet[UNET_TENSOR])[1], opened.shape(unet["out.2.weight"])[0]
    if seen != predicted:
        return f"{_EXTRA_CHANNELS.get(seen, 'another model')} (its U-Net sees {seen} channels, not {predicted})"
    projection = next((name for name in unet if name.endswith(".proj_in.weight")), None)
    linear = projection is not None and len(opened.shape(unet[projection])) == 2
    if linear and "label_emb.0.0.weight" not in unet:
        return "Stable Diffusion 2.x"
    return None


def _target(opened: "_Opened") -> str | None:
    """What the network predicts: by our own metadata, ComfyUI's marker, or the metadata of kohya's scripts."""
    if (said := opened.metadata.get(TARGET_KEY)) is not None:
        return said
    if V_PREDICTION in opened.names:
        return "v"
    return {"v": "v", "epsilon": "epsilon"}.get(opened.metadata.get("modelspec.prediction_type", ""))


def _report(contents: SingleFile, path: Path, key: str) -> None:
    """Log which tensors of a file are not read."""
    if any(name.startswith(_AVERAGE) for name in contents.ignored):
        logger.warning("%s: %s holds averaged weights too (model_ema), which are not read", key, path)
    known = (V_PREDICTION, ZERO_TERMINAL_SNR)
    unknown = [
        name for name in contents.ignored
        if not (name.startswith(_AVERAGE) or name in known or _SCHEDULE.fullmatch(name) or NOT_READ.search(name))
    ]  # fmt: skip
    if unknown:
        logger.warning("%s: %d tensors of %s are not read, such as %s", key, len(unknown), path, unknown[0])


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class _Opened:
    """A file whose tensors are read one by one."""

    names: Collection[str]
    metadata: Mapping[str, str]
    shape: Callable[[str], list[int]]
    read: Callable[[str], Tensor]


def _open(path: Path, key: str) -> _Opened:
    existing_file(path, key)
    if path.suffix == ".safetensors":
        try:
            file = open_weights(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{key}: {path} is damaged, or no safetensors file: {error}") from None
        slices = file.get_slice
        return _Opened(
            tuple(file.keys()), file.metadata() or {}, lambda name: slices(name).get_shape(), file.get_tensor
        )
    tensors = _unpickled(path, key)
    return _Opened(tuple(tensors), {}, lambda name: list(tensors[name].shape), lambda name: tensors[name].clone())


def _unpickled(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, which stay on the disk until they are copied, where its format allows it."""
    try:
        return read_pickled_tensors(path, mmap=True)
    except ValueError as error:
        raise UserError(f"{key}: {path} cannot be read: {error}") from None
