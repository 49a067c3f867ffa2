"""Trained tokens outside of a LoRA's own file: as embeddings of ComfyUI, and bundled by OneTrainer.

An embedding is a file with the tensor `clip_g` (T, D), whose name is what prompts call it. In a LoRA of OneTrainer it
is the tensor `bundle_emb.NAME.clip_g`. Strengths do not apply to an embedding: what it was before training is unknown.
"""

import logging
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from families.common.lora_formats.adapters import Lora, LoraFileError, named_tokens
from modules.tokens import is_new

TENSOR = "clip_g"
_BUNDLED = re.compile(r"bundle_emb\.(?P<name>.+)\.(?P<tensor>\w+)")
logger = logging.getLogger(__name__)


def file_name(token: str) -> str:
    """`[dog]` -> `dog.safetensors`; what names of files and of ComfyUI's embeddings cannot hold becomes `_`."""
    stem = re.sub(r"[^\w.+-]", "_", plain(token)).strip(".")
    return f"{stem or '_'}.safetensors"


def plain(token: str) -> str:
    """A token's name without brackets or the mark of a word's end."""
    return re.sub(r"^[\[<]|[\]>]$|</w>$", "", token)


def embedding_files(lora: Lora) -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """Each trained token as an embedding: name of the file -> tensors and metadata.

    Raises LoraFileError where two tokens would have the same name, on any file system.
    """
    files: dict[str, tuple[dict[str, Tensor], dict[str, str]]] = {}
    taken: dict[str, str] = {}
    for token, row in zip(lora.tokens, _rows(lora), strict=True):
        name = file_name(token)
        if other := taken.get(name.casefold()):
            raise LoraFileError(
                f"the tokens {other} and {token} would both be the embedding {name}: lora and lora-onetrainer keep "
                "tokens inside their file, under their whole names"
            )
        taken[name.casefold()] = token
        files[name] = {TENSOR: row[None]}, {"token": token}
    return files


def bundled(lora: Lora) -> dict[str, Tensor]:
    """Each trained token as OneTrainer bundles it into a LoRA."""
    return {
        f"bundle_emb.{_placeholder(token)}.{TENSOR}": row[None]
        for token, row in zip(lora.tokens, _rows(lora), strict=True)
    }


def _placeholder(token: str) -> str:
    return token if is_new(token) else plain(token)


def _rows(lora: Lora) -> Sequence[Tensor]:
    return lora.token_initial + lora.token_delta if lora.tokens else []


# ---------------------------------------------------------------- reading


def is_embedding(names: Sequence[str]) -> bool:
    return TENSOR in names


def from_embedding(tensors: Mapping[str, Tensor], about: Mapping[str, str], name: str) -> Lora:
    """The tokens of an embedding; `name` is that of its file without a suffix."""
    if unknown := sorted(tensors.keys() - {TENSOR}):
        raise LoraFileError(f"it holds {unknown[0]}, which Stable Cascade's text encoder has no place for")
    return _with_rows(Lora({}), about.get("token", name), tensors[TENSOR])


def without_bundled(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> tuple[dict[str, Tensor], Lora]:
    """The tensors of a LoRA without those of OneTrainer's embeddings, and the tokens that these are."""
    tokens, others = Lora({}), {}
    names = {_placeholder(token): token for token in named_tokens(about)}
    for name, tensor in tensors.items():
        match = _BUNDLED.fullmatch(name)
        if match is None:
            others[name] = tensor
        elif match["tensor"] == TENSOR:
            tokens = _with_rows(tokens, names.get(match["name"], match["name"]), tensor)
        else:
            raise LoraFileError(f"it holds {name}, which Stable Cascade's text encoder has no place for")
    return others, tokens


def _with_rows(lora: Lora, name: str, rows: Tensor) -> Lora:
    """The LoRA with the token of an embedding, or with a token for each of its vectors."""
    if rows.dim() != 2:
        raise LoraFileError(f"the embedding {name} has the shape {tuple(rows.shape)}: (vectors, width) is needed")
    token = name if is_new(name) or name.endswith("</w>") else f"[{name}]"
    tokens = [token] + [f"{token[:-1]}.{i}{token[-1]}" for i in range(2, len(rows) + 1)]
    if tokens != [name]:
        logger.warning("The embedding %s is read where a prompt has %s", name, "".join(tokens))
    return lora.with_tokens(tokens, rows.float(), torch.zeros_like(rows, dtype=torch.float32))
