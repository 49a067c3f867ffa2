"""LoRA files on disk, for the networks of any pipeline: read without unpickling anything, and written.

warpcore     unet.NAME.lora.down, ...                   each tensor under the name of its parameter
diffusers    unet.NAME.lora_A.weight, ...               alpha in the metadata; peft's names
kohya        lora_unet_NAME.lora_down.weight, ...       `alpha` beside it; ComfyUI and A1111 read it too
             lora_unet_NAME.lokr_w1, ...                the same of LyCORIS: LoKr and LoHa
comfyui      diffusion_model.NAME.lora_A.weight, ...    published names of layers, `alpha` beside it
published    net.NAME.lora_A.default.weight, ...        published names; nothing says alpha, which is the rank
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from families.common.exports import Files, write_files
from families.common.lora_formats import embeddings, named, ours, peft, programs
from families.common.lora_formats.adapters import (
    Adapter,
    FactorAdapter,
    Lora,
    LoraFileError,
    OneAdapter,
    named_alpha,
    named_tokens,
    with_min_rank,
)
from families.common.lora_formats.tensors import read_tensors
from modules.lora import Place, places
from warpcore.errors import UserError
from warpcore.safe_json import parse_json, read_object

FORMATS = ("warpcore", "diffusers", "kohya", "comfyui", "published")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The LoRA of a folder that diffusers wrote."""
DIFFUSERS_METADATA = "lora_adapter_metadata"
"""Key of a file's metadata that holds peft's configs, each key behind its network's name."""


def peft_config(path: Path) -> dict:
    """The config of a folder of peft's; nothing for a file."""
    if not path.is_dir():
        return {}
    try:
        return read_object(path / peft.CONFIG, peft.CONFIG)
    except OSError as error:
        raise LoraFileError(f"{peft.CONFIG} cannot be read: {error}") from None
    except UserError as error:
        raise LoraFileError(str(error)) from None


def fitted(adapters: Mapping[str, OneAdapter], there: Mapping[str, Place], hint: str) -> dict[str, OneAdapter]:
    """Adapters that fit the places of a network. One that holds the matrix (R, C_in) for a 1 x 1 convolution, or
    (R, C_in, 1, 1) for a linear layer, gets the shape of the layer here: programs build the same layer as either.

    hint: which keys to check where shapes differ.

    Raises:
        LoraFileError: adapters do not fit, or are not finite.
    """
    return {name: _fitted(name, adapter, there, hint) for name, adapter in adapters.items()}


def _fitted(name: str, adapter: OneAdapter, there: Mapping[str, Place], hint: str) -> OneAdapter:
    if name not in there:
        raise LoraFileError(f"it was made for another network: this one has no layer {name}")
    shape = tuple(there[name].weight.shape)
    adapter = (_with_its_shape if adapter.kind == "lora" else _with_its_kernel)(name, adapter, shape, hint)
    parts = (*adapter.tensors.values(), adapter.magnitude)
    if not all(part.isfinite().all() for part in parts if part is not None):
        raise LoraFileError(f"{name} holds numbers that are not finite: its training went wrong, or it is damaged")
    lengths = (1, shape[1]) if adapter.by_columns else (shape[0],)
    if adapter.magnitude is not None and tuple(adapter.magnitude.shape) != lengths:
        raise LoraFileError(f"{name} has {adapter.magnitude.numel()} lengths of DoRA for a weight of {shape}")
    return adapter


def _with_its_shape(name: str, adapter: Adapter, shape: tuple[int, ...], hint: str) -> Adapter:
    rank, *inner = adapter.down.shape
    made_for = (adapter.up.shape[0], *inner)
    if (*inner[:1], *_kernel(inner)) == (*shape[1:2], *_kernel(shape[1:])):
        adapter = replace(adapter, down=adapter.down.reshape(rank, *shape[1:]))
        made_for = (adapter.up.shape[0], *shape[1:])
    if made_for != shape or rank != adapter.rank:
        raise LoraFileError(
            f"it was made for another network: {name} is {made_for} in the file (rank {adapter.rank}) and {shape} "
            f"here. Check {hint}"
        )
    return adapter


def _with_its_kernel(name: str, adapter: FactorAdapter, shape: tuple[int, ...], hint: str) -> FactorAdapter:
    """A LoKr or LoHa whose only factor that may have a kernel has that of the layer."""
    size, whole = adapter.size, adapter.tensors.get("lokr_w2")
    kernel_differs = whole is not None and whole.dim() > 2 and _kernel(whole.shape[1:]) != _kernel(shape[1:])
    if size != (shape[0], math.prod(shape[1:])) or kernel_differs:
        raise LoraFileError(
            f"it was made for another network: {name} is {size[0]} x {size[1]} in the file ({adapter.title}) and "
            f"{shape} here. Check {hint}"
        )
    if whole is None:
        return adapter
    return replace(adapter, tensors={**adapter.tensors, "lokr_w2": whole.reshape(len(whole), -1, *shape[2:])})


def _kernel(inner: Sequence[int]) -> tuple[int, ...]:
    """The kernel of a weight (C_out, *inner); nothing for one pixel, as linear layers have none."""
    kernel = tuple(inner[1:])
    return kernel if any(side != 1 for side in kernel) else ()


# ---------------------------------------------------------------- the networks of a pipeline


def read_loras(path: Path, networks: Mapping[str, nn.Module], hint: str = "the file") -> dict[str, Lora]:
    """What a LoRA file changes of each of some networks, in any of the formats.

    Args:
        path: a .safetensors file, a folder that diffusers wrote, one of peft's, or one of embeddings.
        networks: by their names in a pipeline of diffusers: `unet` or `transformer`, `text_encoder`,
            `text_encoder_2`; they may be on the meta device.
        hint: which keys to check where shapes differ.

    Raises:
        LoraFileError: it is missing, incomplete, something else, or made for other networks.
    """
    path = Path(path)
    of_peft = path.is_dir() and (path / peft.TENSORS).is_file()
    if path.is_dir() and not of_peft and not (path / DIFFUSERS_FILE).is_file():
        return _read_embeddings(path, text_encoders(networks))
    tensors, about = read_tensors(path / (peft.TENSORS if of_peft else DIFFUSERS_FILE) if path.is_dir() else path)
    tensors = _without_base(tensors)
    there = {name: places(network) | places(network, split_qkv=True) for name, network in networks.items()}
    try:
        if text_encoders(networks) and embeddings.is_embedding(tensors):
            return embeddings.from_embedding(tensors, about, path.stem, text_encoders(networks))
        if ours.is_ours(list(tensors)):
            found = _from_ours(tensors, about, networks)
        else:
            config = peft_config(path) if of_peft else None
            others, found = embeddings.without_bundled(tensors, named_tokens(about), text_encoders(networks))
            for name, own in _by_network(others, networks).items():
                adapters = _from_programs(name, networks[name], own, there[name], _config(about, name, config))
                found[name] = replace(found.get(name, Lora({})), adapters=adapters)
        if not any(own.adapters or own.tokens for own in found.values()):
            raise LoraFileError("it is no LoRA: it holds no tensors")
        found = {name: replace(own, adapters=fitted(own.adapters, there[name], hint)) for name, own in found.items()}
        found |= {name: with_min_rank(found[name], about) for name in found.keys() - text_encoders(networks)}
    except LoraFileError as error:
        raise LoraFileError(f"{path}: {error}") from None
    return embeddings.with_tokens_beside(found, path, named_tokens(about), text_encoders(networks))


def _read_embeddings(folder: Path, encoders: Sequence[str]) -> dict[str, Lora]:
    """The tokens of all embeddings in a folder, such as the one that is written beside a LoRA."""
    found: dict[str, Lora] = {}
    for file in sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".pt")):
        tensors, about = read_tensors(file)
        if not (encoders and embeddings.is_embedding(tensors)):
            raise LoraFileError(f"{file} is no embedding: name the file itself, or a folder of embeddings alone")
        try:
            embeddings.add(found, embeddings.from_embedding(tensors, about, file.stem, encoders))
        except LoraFileError as error:
            raise LoraFileError(f"{file}: {error}") from None
    if not found:
        raise LoraFileError(f"{folder} holds no LoRA ({DIFFUSERS_FILE}, or {peft.TENSORS}) and no embeddings")
    return found


def write_loras(
    loras: Mapping[str, Lora], path: Path, kind: str, networks: Mapping[str, nn.Module],
    about: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Write the LoRAs of a pipeline's networks into one file, in one of `FORMATS`; `networks` as in `read_loras`.

    Raises:
        LoraFileError: the format cannot express something of them.
    """
    write_files(lora_files(loras, path, kind, networks, about))


def lora_files(
    loras: Mapping[str, Lora], path: Path, kind: str, networks: Mapping[str, nn.Module],
    about: Mapping[str, str] | None = None,
) -> Files:  # fmt: skip
    """The files that `write_loras` writes: trained tokens are in ours, and beside the others as embeddings.

    Raises:
        LoraFileError: the format cannot express something of them.
    """
    tensors: dict[str, Tensor] = {}
    about = dict(about or {}) | metadata(loras)
    beside = {} if kind == "warpcore" else embeddings.files_beside(loras, path)
    match kind:
        case "warpcore":
            for name, own in loras.items():
                tensors |= {f"{name}.{tensor}": value for tensor, value in ours.to_tensors(own).items()}
        case "kohya":
            for name, own in loras.items():
                prefix = programs.kohya_prefix(name, networks)
                names = programs.kohya_names(name, networks[name], own.adapters)
                tensors |= named.to_named({prefix + names[place]: a for place, a in own.adapters.items()})
            about |= named.kohya_metadata([a for own in loras.values() for a in own.adapters.values()], about)
        case "diffusers":
            configs = {}
            for name, own in loras.items():
                if not own.adapters:  # tokens alone, which are beside it
                    continue
                names = programs.diffusers_names(name, own.adapters)
                tensors |= peft.to_peft({names[place]: a for place, a in own.adapters.items()}, f"{name}.")[0]
                # Without the prefix that transformers 5 dropped: peft finds a layer by the end of its name.
                ends = {place.removeprefix(programs.TEXT_MODEL): a for place, a in own.adapters.items()}
                configs |= {f"{name}.{key}": value for key, value in peft.to_peft(ends, "")[1].items()}
            about[DIFFUSERS_METADATA] = json.dumps(configs)
        case "comfyui" | "published":
            for name, own in loras.items():
                names = programs.published_names(networks[name], own.adapters)
                if lacking := own.adapters.keys() - names.keys():
                    raise LoraFileError(
                        f"{sorted(lacking)[0]} has no published name: this network has no {kind} format"
                    )
                layers = {names[place]: adapter for place, adapter in own.adapters.items()}
                tensors |= named.to_comfyui(layers) if kind == "comfyui" else named.to_published(layers)
        case _:
            raise LoraFileError(f"there is no LoRA format {kind!r}; write one of {', '.join(FORMATS)}")
    return {path: (tensors, about)} | beside


def metadata(loras: Mapping[str, Lora]) -> dict[str, str]:
    """What our file of a pipeline's networks says about its tensors."""
    adapters = {f"{name}.{place}": adapter for name, own in loras.items() for place, adapter in own.adapters.items()}
    tokens = list(dict.fromkeys(token for own in loras.values() for token in own.tokens + own.missing_tokens))
    min_rank = next((own.min_rank for own in loras.values() if own.min_rank is not None), None)
    return ours.metadata(Lora(adapters, tokens, min_rank=min_rank))


def notes_of_ranks(loras: Iterable[Lora], kind: str) -> list[str]:
    """What to know of LoRAs in a format of another program, or `merged` into weights, whose rank follows the noise."""
    min_rank = next((lora.min_rank for lora in loras if lora.min_rank is not None), None)
    if min_rank is None or kind == "warpcore":
        return []
    return [f"It was trained with min_rank: {min_rank}; other programs draw with its full rank at every noise"]


def text_encoders(networks: Iterable[str]) -> list[str]:
    """The names of text encoders among those of a pipeline's networks."""
    return sorted(name for name in networks if name.startswith("text_encoder"))


def _from_ours(
    tensors: Mapping[str, Tensor], about: Mapping[str, str], networks: Mapping[str, nn.Module]
) -> dict[str, Lora]:
    """What our own file holds by network; a file of one network may have names without its own."""
    if len(networks) == 1 and not any(place.startswith(f"{name}.") for place in tensors for name in networks):
        return {name: ours.from_ours(tensors, about) for name in networks}
    found: dict[str, dict[str, Tensor]] = {}
    for place, tensor in tensors.items():
        name, _, own = place.partition(".")
        if name not in networks:
            raise LoraFileError(
                f"it was made for another network: it changes {place}; here it is read for {', '.join(networks)} alone"
            )
        found.setdefault(name, {})[own] = tensor
    alpha = named_alpha(about)
    alphas = {name: {place.removeprefix(f"{name}."): value for place, value in alpha.items()
                     if place.startswith(f"{name}.")} if isinstance(alpha, dict) else alpha
              for name in found}  # fmt: skip
    return {
        name: ours.from_ours(own, dict(about) | {"alpha": json.dumps(alphas[name])}) for name, own in found.items()
    }


def _by_network(tensors: Mapping[str, Tensor], networks: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """A file's tensors by network, without what names it; names without any are of the only network."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        bare = name.removeprefix("base_model.model.")
        options = [(network, prefix) for network in networks for prefix in programs.prefixes(network)]
        network, prefix = next(((n, p) for n, p in options if bare.startswith(p)), (None, ""))
        if network is None and (len(networks) > 1 or re.match(r"lora_(te\d?|unet)_|text_encoder|unet\.", bare)):
            if not any(re.search("lora|lokr|hada|dora", other) for other in tensors):
                raise LoraFileError(f"it is no LoRA: it holds {name}, as files of whole weights do")
            raise LoraFileError(f"it holds {name}; here it is read for {', '.join(networks)} alone")
        found.setdefault(network or next(iter(networks)), {})[_without_processor(bare.removeprefix(prefix))] = tensor
    return found


def _without_base(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file of a whole network with peft's adapters in it holds of these; other files as they are."""
    if not any(".base_layer." in name for name in tensors):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if re.search(r"\.lora_[AB]\.", name)}


def _without_processor(name: str) -> str:
    """diffusers before peft kept adapters in attention's processors: `attn1.processor.to_q_lora.down.weight`."""
    match = re.fullmatch(r"(.+)\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight", name)
    if match is None:
        return name
    layer = "to_out.0" if match[2] == "to_out" else match[2]
    return f"{match[1]}.{layer}.lora.{match[3]}.weight"


def _config(about: Mapping[str, str], network: str, of_folder: Mapping | None) -> dict:
    """peft's config of a network: that of its folder, or what diffusers noted in the file."""
    if of_folder is not None:
        return dict(of_folder)
    try:
        noted = parse_json(about.get(DIFFUSERS_METADATA, "{}"))
        return {key.removeprefix(f"{network}."): v for key, v in noted.items() if key.startswith(f"{network}.")}
    except (ValueError, AttributeError):
        raise LoraFileError(f"its metadata's {DIFFUSERS_METADATA} is no JSON object") from None


def _from_programs(
    name: str, network: nn.Module, tensors: Mapping[str, Tensor], there: Mapping[str, Place], config: Mapping
) -> dict[str, OneAdapter]:
    names = programs.names_read(name, network, list(there))
    return named.from_named(tensors, names, config, prefix="", not_read={}, weights=there.keys(), network=name)
