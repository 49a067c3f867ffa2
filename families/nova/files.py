"""NOVA's transformer in files: a published folder, or a pipeline's, with `config.json` and the weights; or a single
file, as runs export it."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from families.common.library_files import component_folder, read_config, read_tensors
from families.common.weights import WeightsError, read_weights

PART = "transformer"
"""The folder of the network in a pipeline's."""
CLASS = "NOVATransformer3DModel"
"""What `config.json` calls the network."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLED = "diffusion_pytorch_model.bin"
"""As which the published training saves the weights; read without running any code in it."""
NEEDED = ("mask_embed.bos_token", "video_encoder.patch_embed.proj.weight", "image_decoder.head.weight")
MOTION, MIXER = "motion_embed.", "video_encoder.mixer."
"""What the parts are called that networks of clips have, and those of pictures need not."""
MIXER_RANK = {"lora": f"{MIXER}lora.weight", "full": f"{MIXER}proj.weight"}


def is_of_nova(names: Collection[str]) -> bool:
    """Whether tensors of these names are a NOVA's."""
    return all(name in names for name in NEEDED)


def config_said(path: Path, key: str) -> dict[str, Any] | None:
    """The constructor numbers that a folder, or a file, says of the network in it; None where it says none. Raises
    UserError where there is nothing."""
    folder = component_folder(path, PART)
    return read_config(folder, key) if folder.is_dir() or path.suffix != ".bin" else None


def read_nova(path: Path, key: str) -> dict[str, Tensor]:
    """The tensors of the network in a folder or file; see `check_mixer`.

    key: the config key that named it, which an error names.

    Raises:
        UserError: it is missing, damaged, or of another network.
    """
    place = component_folder(path, PART)
    tensors = folder_tensors(place, key) if place.is_dir() else read_weights(place, key)
    if not is_of_nova(tensors):
        held = ", ".join(sorted(tensors)[:3]) or "nothing"
        missing = next(name for name in NEEDED if name not in tensors)
        raise WeightsError(f"{key}: {path} holds no NOVA: {missing} is missing, and it has {held}")
    return tensors


def check_mixer(tensors: Mapping[str, Tensor], mixer_rank: int, path: Path, key: str) -> None:
    """Raise UserError where the tensors of a path have another mixer of frames than `video_mixer_rank` says."""
    if (found := _mixer_in(tensors)) != (mixer_rank or None):
        raise WeightsError(f"{key}: the weights of {path} have {_named(found)}: write video_mixer_rank: {found or 0}")


def lacking_of_clips(network: Collection[str], tensors: Collection[str]) -> list[str]:
    """What tensors of a network of pictures lack of one of clips; nothing where they lack something else, too.

    network: the names in its state.
    """
    lacking = [name for name in network if name not in tensors]
    parts = [MOTION] if any(name.startswith(MIXER) for name in tensors) else [MOTION, MIXER]
    of_clips = [name for name in network if name.startswith(tuple(parts))]
    return lacking if lacking == of_clips and any(name.startswith(MOTION) for name in lacking) else []


def folder_tensors(folder: Path, key: str) -> dict[str, Tensor]:
    """The tensors of a folder: of its safetensors files, else of its `diffusion_pytorch_model.bin`."""
    pickled = folder / PICKLED
    if pickled.is_file() and not any(folder.glob("*.safetensors*")):
        return read_weights(pickled, key)
    return read_tensors(folder, key)


def _mixer_in(tensors: Mapping[str, Tensor]) -> int | None:
    """The rank of the mixer of frames in tensors, -1 where it is full; None without one."""
    if MIXER_RANK["full"] not in tensors:
        return None
    return len(tensors[MIXER_RANK["lora"]]) if MIXER_RANK["lora"] in tensors else -1


def _named(rank: int | None) -> str:
    if rank is None:
        return "no mixer of frames"
    return f"a mixer of rank {rank}" if rank > 0 else "a mixer of full rank"
