"""ControlNets of Stage C: what a config says of them, their filters, their networks and their files."""

import importlib
import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import NonNegativeInt, create_model
from safetensors import SafetensorError
from torch import Tensor

from families.cascade.config import ModelSettings
from families.common.poses import PoseField
from families.common.weights import WeightsError, read_weights, with_weights
from modules.controlnet import BOTTLENECK_MODES, ControlNet
from modules.effnet import EFFICIENTNET_V2_S
from modules.filters import FILTERS, Filter
from modules.safetensors_files import open_weights
from modules.stage_c import StageC
from warpcore.config import ConfigError, Settings, make_config
from warpcore.data.fields import PictureField
from warpcore.safe_json import parse_object

METADATA_KEY = "controlnet"
"""Where a file of ours says how its ControlNet was made."""


class ControlNetSettings(Settings):
    """What a ControlNet is, beside its weights."""

    controlnet_blocks: list[NonNegativeInt]
    """Numbers of the controlled convolution blocks of Stage C, counted from 0 as they run (3.6B has 64, 1B 32, mini
    6)."""
    controlnet_filter: str
    """What makes the condition: `CannyFilter`, `InpaintFilter`, ..., or the importable name of a `Filter` of your own
    (`my_package.my_module.MyFilter`)."""
    controlnet_filter_params: dict[str, Any] | None = None
    """Arguments of the filter; by default its own."""
    controlnet_bottleneck_mode: Literal[BOTTLENECK_MODES] | None = None
    """What looks at the condition: `effnet` (default) at pictures, `simple` at maps of few positions, `large` at
    latents."""
    official_stem: bool = False
    """Leave out the padding of the first convolution for other than 3 channels, as the published files want it."""


# ------------------------------------------------------------------ filters


def make_filter(settings: ControlNetSettings, for_drawing: bool = False) -> Filter:
    """The filter that the settings name.

    for_drawing: without the accidents that only training wants, such as faces left out.

    Raises:
        ConfigError: there is no such filter, or its parameters are wrong.
    """
    name, params = settings.controlnet_filter, settings.controlnet_filter_params or {}
    kind = FILTERS.get(name) or _imported(name)
    params = params | (kind.when_drawing if for_drawing else {})
    arguments = inspect.signature(kind, eval_str=True).parameters.values()
    fields = {
        argument.name: (
            Any if argument.annotation is argument.empty else argument.annotation,
            ... if argument.default is argument.empty else argument.default,
        )
        for argument in arguments
    }
    try:
        checked = make_config(create_model(name.rpartition(".")[2], __base__=Settings, **fields), params)
        return kind(**{given: getattr(checked, given) for given in params})
    except ValueError as error:
        raise ConfigError(f"controlnet_filter_params of {name}: {error}") from error


def _imported(name: str) -> type[Filter]:
    module, _, kind = name.rpartition(".")
    known = ", ".join(FILTERS)
    if not module:
        raise ConfigError(
            f"controlnet_filter: there is no {name!r}; write one of {known}, or the importable name of your own "
            "(my_package.my_module.MyFilter)"
        )
    try:
        found = getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"controlnet_filter: {name} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Filter)):
        raise ConfigError(f"controlnet_filter: {name} does not subclass modules.filters.Filter; there are {known}")
    return found


def filter_fields(filter: Filter) -> dict[str, PictureField | PoseField]:
    """The further member that a filter looks at, for `WarpCore.extra_fields`."""
    if filter.member is None:
        return {}
    suffixes = (filter.member,)
    return {filter.member: PoseField(suffixes) if filter.member.endswith("json") else PictureField(suffixes, 3)}


def check_side(filter: Filter, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise ConfigError where pictures of one of the `sizes` (H, W) are too small for the filter."""
    smallest = min(sizes, key=min)
    if min(smallest) < filter.least_side_px:
        raise ConfigError(
            f"controlnet_filter: {type(filter).__name__} needs pictures of {filter.least_side_px} px or more, "
            f"but some would have {smallest[1]} x {smallest[0]} px: raise image_size, or leave out the longest ratios"
        )


# ------------------------------------------------------------------ networks


def make_controlnet(
    settings: ControlNetSettings, model: ModelSettings, filter: Filter, widths: list[int], path: Path | None = None
) -> ControlNet:
    """The adapter for a generator with such `residual_widths`, new or with the weights of a file.

    Raises:
        ConfigError: the generator has no such blocks.
        WeightsError: the file is of another ControlNet.
    """
    blocks = settings.controlnet_blocks
    beyond = [block for block in blocks if block >= len(widths)]
    if beyond:
        raise ConfigError(
            f"controlnet_blocks: there is no block {', '.join(map(str, beyond))}; Stage C ({model.model_version}) has "
            f"{len(widths)} convolution blocks, 0 to {len(widths) - 1}"
        )
    if len({widths[block] for block in blocks}) != 1 or len(set(blocks)) < len(blocks):
        raise ConfigError(f"controlnet_blocks: {blocks} must be different blocks, at least one, all of one width")
    arguments = {
        "c_in": filter.channels,
        "c_proj": widths[blocks[0]],
        "proj_blocks": blocks,
        "bottleneck_mode": settings.controlnet_bottleneck_mode or "effnet",
        "stages": model.version.encoder.get("stages", EFFICIENTNET_V2_S),
        "patch_size": model.version.patch_size,
        "official_stem": settings.official_stem,
    }
    network = with_weights(lambda: ControlNet(**arguments), path, "controlnet_checkpoint_path")
    return network.to(memory_format=torch.channels_last)


def load_controlnet(
    path: Path, model: ModelSettings, said: Mapping[str, Any] | None = None
) -> tuple[ControlNet, Filter]:
    """The ControlNet of a file and its filter, for drawing with the generator of `model`.

    said: keys of `ControlNetSettings`, see `settings_of_file`.

    Raises UserErrors as `settings_of_file`, `make_filter` and `make_controlnet` do.
    """
    settings = settings_of_file(path, said)
    name = settings.controlnet_filter
    if name not in FILTERS and name != (said or {}).get("controlnet_filter"):  # importing a module runs its code
        raise WeightsError(
            f"controlnet: {path} says that its filter is {name!r}, which is none of {', '.join(FILTERS)}. Code that a "
            f"file names is not run: if this filter is yours, write controlnet_filter: {name}"
        )
    filter = make_filter(settings, for_drawing=True)
    with torch.device("meta"):
        widths = StageC(**model.version.stage_c).residual_widths
    return make_controlnet(settings, model, filter, widths, path), filter


# ------------------------------------------------------------------ files

# c_in and bottleneck mode of the published ControlNets, which say nothing about themselves -> filter.
_PUBLISHED_FILTERS = {
    (1, "effnet"): "CannyFilter",
    (4, "effnet"): "InpaintFilter",
    (16, "large"): "SREffnetFilter",
    (512, "simple"): "IdentityFilter",
}
_EIGHT_BLOCKS = [0, 4, 8, 12, 51, 55, 59, 63]
_PUBLISHED_BLOCKS = {8: _EIGHT_BLOCKS, 64: list(range(64))}
_COMFYUI_MODES = ("effnet", "large")


def file_metadata(settings: ControlNetSettings) -> dict[str, str]:
    """What a file of weights should say of its ControlNet."""
    return {METADATA_KEY: settings.model_dump_json(include=set(ControlNetSettings.model_fields))}


def settings_of_file(path: Path, said: Mapping[str, Any] | None = None) -> ControlNetSettings:
    """How the ControlNet of a weights file was made: by its metadata, or by its shapes if it is a published one.

    said: keys of `ControlNetSettings` that count instead, such as the filter of a file that says nothing.

    Raises:
        WeightsError: the file is missing, unreadable or something else, or says too little.
    """
    said = dict(said or {})
    if path.suffix == ".safetensors" and path.is_file():
        with suppress(SafetensorError), open_weights(path) as file:
            about = (file.metadata() or {}).get(METADATA_KEY)
            if about is not None:
                return _settings(parse_object(about, f"controlnet: the metadata of {path}") | said, path)
    state = read_weights(path, "controlnet")  # says what is wrong with a broken file
    stem = state.get("backbone.0.0.weight", state.get("backbone.0.weight"))
    modes = {"effnet": "backbone.0.0.weight", "large": "backbone.3.blocks.0.weight", "simple": "backbone.2.weight"}
    mode = next((mode for mode, name in modes.items() if name in state), None)
    count = sum(name.startswith("projections.") and name.endswith(".2.weight") for name in state)
    if stem is None or mode is None or not count:
        raise WeightsError(f"controlnet: {path} holds no ControlNet: its tensors have other names")
    found = {
        "controlnet_filter": _PUBLISHED_FILTERS.get((stem.shape[1], mode)),
        "controlnet_blocks": _PUBLISHED_BLOCKS.get(count),
        "controlnet_bottleneck_mode": mode,
        "official_stem": True,
    } | said
    if unsaid := [key for key, value in found.items() if value is None]:
        raise WeightsError(
            f"controlnet: {path} does not say how it was made, and is none of the published ones ({stem.shape[1]} "
            f"channels, {count} blocks): give {' and '.join(unsaid)} as in its training config"
        )
    return _settings(found, path)


def _settings(found: Mapping[str, Any], path: Path) -> ControlNetSettings:
    try:
        return make_config(ControlNetSettings, found)
    except ConfigError as error:
        raise WeightsError(f"controlnet: {path}: {error}") from None


def published_layout(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a ControlNet of ours as the reference implementation loads them, and what to know about them.

    Raises:
        WeightsError: the reference implementation has no place for it.
    """
    settings, state = settings_of_file(path), read_weights(path, "controlnet")
    width, features, *patch = state["projections.0.2.weight"].shape[:2] + state["projections.0.0.weight"].shape[2:]
    stem = state.get("backbone.0.0.weight")
    if width != 2048 or patch != [1, 1] or (stem is not None and features != 1280):
        raise WeightsError(
            f"controlnet: {path} cannot be published there: the reference implementation controls Stage C 3.6B only, "
            f"whose blocks are 2048 wide, not {width}"
        )
    notes = []
    if stem is not None and stem.shape[1] != 3 and not settings.official_stem:
        notes.append(
            "The reference implementation does not pad before the first convolution: it sees the condition shifted by "
            "one pixel, and so does ComfyUI. A ControlNet trained with official_stem: true is the same there"
        )
    return state, notes


def comfyui_notes(settings: ControlNetSettings, state: Mapping[str, Tensor]) -> list[str]:
    """Why ComfyUI, which reads the official names, cannot draw with a ControlNet; nothing where it can.

    Its loader knows the blocks of no file: the projections go to eight fixed blocks of Stage C 3.6B, in this order. It
    tells `effnet` and `large` from the tensors' names, and no other bottleneck.
    """
    mode, blocks = settings.controlnet_bottleneck_mode or "effnet", settings.controlnet_blocks
    reasons = []
    if mode not in _COMFYUI_MODES:
        reasons.append(f"it knows the bottlenecks {' and '.join(_COMFYUI_MODES)} only, not {mode}")
    if blocks != _EIGHT_BLOCKS:
        reasons.append(f"it controls the blocks {_EIGHT_BLOCKS} whatever the file says, and this one is for {blocks}")
    if (width := state["projections.0.2.weight"].shape[0]) != 2048:
        reasons.append(f"its blocks are 2048 wide, not {width}")
    return [f"Not for ComfyUI: {'; '.join(reasons)}"] if reasons else []
