"""Trained tokens outside of a LoRA's own file: as embeddings of ComfyUI, and bundled by OneTrainer.

An embedding is a file with the tensor `clip_g` (T, D), whose name is what prompts call it. In a LoRA of OneTrainer it
is the tensor `bundle_emb.NAME.clip_g`. Strengths do not apply to an embedding: what it was before training is unknown.
"""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from families.common.lora_formats.adapters import Lora, LoraFileError, named_tokens
from families.common.lora_formats.embeddings import Files, named_files, placeholder, rows_of, with_rows

TENSOR = "clip_g"
_BUNDLED = re.compile(r"bundle_emb\.(?P<name>.+)\.(?P<tensor>\w+)")


def embedding_files(lora: Lora) -> Files:
    """Each trained token as an embedding: name of the file -> tensors and metadata.

    Raises LoraFileError where two tokens would have the same name, on any file system.
    """
    return named_files({token: {TENSOR: row[None]} for token, row in rows_of(lora)})


def bundled(lora: Lora) -> dict[str, Tensor]:
    """Each trained token as OneTrainer bundles it into a LoRA."""
    return {f"bundle_emb.{placeholder(token)}.{TENSOR}": row[None] for token, row in rows_of(lora)}


# ---------------------------------------------------------------- reading


def is_embedding(names: Sequence[str]) -> bool:
    return TENSOR in names


def from_embedding(tensors: Mapping[str, Tensor], about: Mapping[str, str], name: str) -> Lora:
    """The tokens of an embedding; `name` is that of its file without a suffix."""
    if unknown := sorted(tensors.keys() - {TENSOR}):
        raise LoraFileError(f"it holds {unknown[0]}, which Stable Cascade's text encoder has no place for")
    return with_rows(Lora({}), about.get("token", name), tensors[TENSOR])


def without_bundled(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> tuple[dict[str, Tensor], Lora]:
    """The tensors of a LoRA without those of OneTrainer's embeddings, and the tokens that these are."""
    tokens, others = Lora({}), {}
    names = {placeholder(token): token for token in named_tokens(about)}
    for name, tensor in tensors.items():
        match = _BUNDLED.fullmatch(name)
        if match is None:
            others[name] = tensor
        elif match["tensor"] == TENSOR:
            tokens = with_rows(tokens, names.get(match["name"], match["name"]), tensor)
        else:
            raise LoraFileError(f"it holds {name}, which Stable Cascade's text encoder has no place for")
    return others, tokens
