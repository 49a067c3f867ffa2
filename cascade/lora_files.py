"""LoRA files on disk: reading any of the formats of `cascade.lora_formats` for a network, and writing each."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from cascade import lora_formats
from cascade.lora_formats import Adapter, Lora, LoraFileError
from modules.lora import Place, places
from modules.tokenizers import Tokenizer
from modules.tokens import TokenRows, is_new
from warpcore.weights import write_weights

FORMATS = ("warpcore", "reference", "comfyui", "peft")
_PEFT_TENSORS, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def read_lora(
    path: Path, network: nn.Module, filters: Sequence[str] = (".attn",), rows: TokenRows | None = None
) -> Lora:
    """Read a LoRA in any of the formats for a network, whose names and shapes it has to fit.

    Args:
        path: a .safetensors or PyTorch file, or a folder of peft's.
        network: may be on the meta device.
        filters, rows: what a numbered file of the reference does not say: `module_filters` of its training, and the
            tokens that its `train_tokens` stand for.

    Raises:
        LoraFileError: it is missing, not whole, something else, or made for another network.
    """
    path = Path(path)
    tensors, about = _read_tensors(path / _PEFT_TENSORS if path.is_dir() else path)
    there = places(network) | places(network, split_qkv=True)
    try:
        if lora_formats.is_ours(list(tensors)):
            lora = lora_formats.from_ours(tensors, about)
        elif "weights.0.lora_down" in tensors:
            lora = lora_formats.from_reference(tensors, about, there, filters, rows)
        else:
            lora = lora_formats.from_others(tensors, there, _peft_config(path))
        if not lora.adapters and not lora.tokens:
            raise LoraFileError(f"it is no LoRA: its tensors are named like {next(iter(tensors), 'nothing')!r}")
        _check(lora.adapters, there)
    except LoraFileError as error:
        raise LoraFileError(f"{path}: {error}") from None
    return lora


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise LoraFileError(f"there is no LoRA file {path}")
    try:
        if path.suffix != ".safetensors":
            return torch.load(path, map_location="cpu", weights_only=True), {}
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # whatever unpickling may raise
        raise LoraFileError(f"{path} cannot be read as a LoRA: {error}") from error


def _peft_config(path: Path) -> dict:
    return json.loads((path / _PEFT_CONFIG).read_text(encoding="utf-8")) if path.is_dir() else {}


def _check(adapters: Mapping[str, Adapter], there: Mapping[str, Place]) -> None:
    for name, adapter in adapters.items():
        if name not in there:
            raise LoraFileError(f"it was made for another network: this one has no layer {name}")
        shape = tuple(there[name].weight.shape)
        made_for = (adapter.up.shape[0], *adapter.down.shape[1:])
        if made_for != shape or adapter.down.shape[0] != adapter.rank:
            raise LoraFileError(
                f"it was made for another network: {name} is {made_for} in the file (rank {adapter.rank}) and {shape} "
                "here. Check model_version"
            )


def write_lora(
    lora: Lora, path: Path, kind: str = "warpcore", network: nn.Module | None = None,
    tokenizer: Tokenizer | None = None, about: Mapping[str, str] | None = None,
) -> list[Path]:  # fmt: skip
    """Write a LoRA in one of `FORMATS`; returns the files written.

    Args:
        path: the file; for `peft` the folder.
        network, tokenizer: needed for `reference`: its order of layers, and the ids of the tokens.
        about: further metadata.

    `comfyui` puts each token beside the file, as NAME.safetensors for the folder of embeddings.

    Raises:
        LoraFileError: the format cannot express something of it.
    """
    path = Path(path)
    about = dict(about or {}) | lora_formats.metadata(lora)
    files: dict[Path, tuple[dict[str, Tensor], dict[str, str]]] = {}
    match kind:
        case "warpcore":
            files[path] = lora_formats.to_tensors(lora), about
        case "reference":
            files[path] = lora_formats.to_reference(lora, places(network), _token_ids(lora, tokenizer)), about
        case "comfyui":
            said = {"ss_network_module": "networks.lora", "ss_network_dim": about["rank"]}
            files[path] = lora_formats.to_comfyui(lora), said | {"ss_network_alpha": about["alpha"]}
            for name, tensors in lora_formats.token_embeddings(lora).items():
                files[path.with_name(f"{name}.safetensors")] = tensors, {}
        case "peft":
            tensors, config = lora_formats.to_peft(lora)
            files[path / _PEFT_TENSORS] = tensors, {}
        case _:
            raise LoraFileError(f"there is no LoRA format {kind!r}; write one of {', '.join(FORMATS)}")
    for file, (tensors, said) in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        own = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
        write_weights(file, own, {"format": "pt"} | said)
    if kind == "peft":
        (path / _PEFT_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return list(files)


def _token_ids(lora: Lora, tokenizer: Tokenizer | None) -> dict[str, int]:
    """New tokens are counted from the end of the vocabulary."""
    if not lora.tokens:
        return {}
    new = [token for token in lora.tokens if is_new(token)]
    return tokenizer.vocabulary | {token: tokenizer.vocab_size + i for i, token in enumerate(new)}
