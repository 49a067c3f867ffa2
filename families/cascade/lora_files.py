"""LoRA files of Stable Cascade: reading any of their formats for a network, and writing each."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from families.cascade.lora_formats import embeddings, layouts, reference
from families.common.exports import Files, write_files
from families.common.lora_files import fitted, notes_of_ranks, peft_config
from families.common.lora_formats import named, ours, peft
from families.common.lora_formats.adapters import Lora, LoraFileError, named_tokens, with_min_rank
from families.common.lora_formats.embeddings import embeddings_folder, file_name
from families.common.lora_formats.tensors import read_tensors
from families.common.lora_training import missing_tokens
from modules.lora import places
from modules.tokenizers import Tokenizer
from modules.tokens import TokenRows, is_new

FORMATS = ("warpcore", "reference", *layouts.PREFIXES, "peft")

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- reading


def read_lora(
    path: Path, network: nn.Module, filters: Sequence[str] = (".attn",), rows: TokenRows | None = None
) -> Lora:
    """Read a LoRA in any of the formats for a network, whose names and shapes it has to fit, or embeddings.

    Args:
        path: a .safetensors or PyTorch file, a folder of peft's, or a folder of embeddings.
        network: may be on the meta device.
        filters, rows: what a numbered file of the reference does not say: `module_filters` of its training, and the
            tokens that its `train_tokens` stand for.

    Tokens that were exported as embeddings beside the file come with it.

    Raises:
        LoraFileError: it is missing, not whole, something else, made for another network, or holds what is not read.
    """
    path = Path(path)
    if path.is_dir() and not (path / peft.TENSORS).exists():
        return _read_embeddings(path)
    tensors, about = read_tensors(path / peft.TENSORS if path.is_dir() else path)
    there = places(network) | places(network, split_qkv=True)
    try:
        if ours.is_ours(list(tensors)):
            lora = ours.from_ours(tensors, about)
        elif reference.FIRST_TENSOR in tensors:
            lora = reference.from_reference(tensors, about, there, filters, rows)
        elif embeddings.is_embedding(list(tensors)):
            return embeddings.from_embedding(tensors, about, path.stem)
        else:
            others, tokens = embeddings.without_bundled(tensors, about)
            lora = layouts.from_named(others, there, peft_config(path))
            if tokens.tokens:
                lora = lora.with_tokens(tokens.tokens, tokens.token_initial, tokens.token_delta)
        if not lora.adapters and not lora.tokens:
            raise LoraFileError("it is no LoRA: it holds no tensors")
        lora = replace(lora, adapters=fitted(lora.adapters, there, "model_version"))
        lora = with_min_rank(lora, about)
        if lora.token_delta is not None and len(lora.token_delta) != len(lora.tokens):
            raise LoraFileError(f"it has {len(lora.token_delta)} rows of tokens, and names {len(lora.tokens)} of them")
        named_tokens(about)
    except LoraFileError as error:
        raise LoraFileError(f"{path}: {error}") from None
    return _with_tokens_beside(lora, path, about)


def _read_embeddings(folder: Path) -> Lora:
    lora = Lora({})
    for file in sorted(folder.glob("*.safetensors")):
        tokens = _embedding(file)
        lora = lora.with_tokens(tokens.tokens, tokens.token_initial, tokens.token_delta)
    if not lora.tokens:
        raise LoraFileError(f"{folder} is neither a folder of peft's ({peft.TENSORS}) nor one of embeddings")
    return lora


def _embedding(file: Path, name: str | None = None) -> Lora:
    tensors, about = read_tensors(file)
    if not embeddings.is_embedding(list(tensors)):
        raise LoraFileError(f"{file} is no embedding: it has no {embeddings.TENSOR}")
    try:
        return embeddings.from_embedding(tensors, about if name is None else about | {"token": name}, file.stem)
    except LoraFileError as error:
        raise LoraFileError(f"{file}: {error}") from None


def _with_tokens_beside(lora: Lora, path: Path, about: Mapping[str, str]) -> Lora:
    """The LoRA with the tokens that its metadata names, where they were exported beside it."""
    for token in named_tokens(about):
        if token in lora.tokens:
            continue
        name = file_name(token)
        found = next(filter(_holds_embedding, (embeddings_folder(path) / name, path.with_name(name))), None)
        if found is None:
            lora.missing_tokens.append(token)
        else:
            read = _embedding(found, token)
            lora = lora.with_tokens(read.tokens, read.token_initial, read.token_delta)
    return lora


def _holds_embedding(file: Path) -> bool:
    """Whether there is an embedding as we export it, and no file of something else with the name of a token."""
    return file.is_file() and set(read_tensors(file)[0]) == {embeddings.TENSOR}


# ---------------------------------------------------------------- writing


def token_files(lora: Lora, path: Path) -> Files:
    """Each token as an embedding, in the folder beside the file at `path`."""
    return {embeddings_folder(path) / name: file for name, file in embeddings.embedding_files(lora).items()}


def lora_files(
    lora: Lora, path: Path, kind: str = "warpcore", network: nn.Module | None = None,
    tokenizer: Tokenizer | None = None, about: Mapping[str, str] | None = None,
) -> Files:  # fmt: skip
    """The files of a LoRA in one of `FORMATS`, which nothing has been written of yet.

    Args:
        path: the file; for `peft` the folder.
        network, tokenizer: needed for `reference`: its order of layers, and the ids of the tokens.
        about: further metadata.

    Raises:
        LoraFileError: the format cannot express something of it.
    """
    path, about = Path(path), dict(about or {}) | ours.metadata(lora)
    match kind:
        case "warpcore":
            return {path: (ours.to_tensors(lora), about)}
        case "reference":
            tensors = reference.to_reference(lora, places(network), _token_ids(lora, tokenizer))
            return {path: (tensors, about | {"layers": reference.layers_in_order(lora)})}
        case "comfyui" | "kohya":
            about |= named.kohya_metadata(lora.adapters.values(), about)
            return {path: (layouts.to_named(lora, kind), about)} | token_files(lora, path)
        case "onetrainer":
            return {path: (layouts.to_named(lora, kind) | embeddings.bundled(lora), about)}
        case "peft":
            tensors, config = layouts.to_peft(lora)
            return {path / peft.TENSORS: (tensors, about), path / peft.CONFIG: json.dumps(config, indent=1) + "\n"}
    raise LoraFileError(f"there is no LoRA format {kind!r}; write one of {', '.join(FORMATS)}")


def write_lora(lora: Lora, path: Path, kind: str = "warpcore", *arguments, **keywords) -> list[Path]:
    """Write the `lora_files` of a LoRA, over what may be there; returns their paths."""
    files = lora_files(lora, path, kind, *arguments, **keywords)
    write_files(files)
    return list(files)


def shortcomings(lora: Lora, kind: str) -> list[str]:
    """What to know of a LoRA in a format, beyond what the format refuses."""
    notes = []
    by_rows = any(a.magnitude is not None and not a.by_columns for a in lora.adapters.values())
    if by_rows and kind == "comfyui":
        notes.append(
            "ComfyUI draws DoRA wrongly, as it divides by lengths of the weights without the LoRA: use lora-merged"
        )
    if by_rows and kind == "onetrainer":
        notes.append("OneTrainer reads this DoRA with Decompose Output Axis switched on")
    if lora.tokens and kind == "peft":
        notes.append(f"The tokens {', '.join(lora.tokens)} stay behind: peft's folder has no place for them")
    if lora.missing_tokens:
        notes.append(missing_tokens(lora))
    return notes + notes_of_ranks([lora], kind)


def _token_ids(lora: Lora, tokenizer: Tokenizer | None) -> dict[str, int]:
    """New tokens are counted from the end of the vocabulary."""
    if not lora.tokens:
        return {}
    new = [token for token in lora.tokens if is_new(token)]
    return tokenizer.vocabulary | {token: tokenizer.vocab_size + i for i, token in enumerate(new)}
