"""Trained tokens outside of our LoRA file, as textual-inversion embeddings (arXiv:2208.01618).

An embedding is a file with one tensor (T, D) for each text encoder, called

    TOKEN, emb_params      one encoder (Stable Diffusion 1.5): as diffusers writes it; of kohya's scripts and A1111
    clip_l, clip_g         two encoders (SDXL): of kohya's scripts, ComfyUI and A1111

A LoRA file of OneTrainer and A1111 holds them as `bundle_emb.NAME.TENSOR`. Strengths do not apply to an embedding:
what it was before training is unknown.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.common.lora_formats.adapters import Lora, LoraFileError
from families.common.lora_formats.tensors import read_tensors
from modules.tokens import is_new

OF_ENCODER = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
"""The tensor of each encoder, where there are two."""
ALONE = "emb_params"
"""The tensor of the only encoder."""
PICKLED = "string_to_param"
"""Of A1111's `.pt` files: holds the tensor, by its placeholder `*`."""
Files = dict[str, tuple[dict[str, Tensor], dict[str, str]]]
"""Name -> tensors and metadata."""
logger = logging.getLogger(__name__)
_BUNDLED = re.compile(r"bundle_emb\.(?P<name>.+?)\.(?P<tensor>string_to_param\..+|\w+)")


def file_name(token: str) -> str:
    """`[dog]` -> `dog.safetensors`; what names of files and of ComfyUI's embeddings cannot hold becomes `_`."""
    stem = re.sub(r"[^\w.+-]", "_", plain(token)).strip(".")
    return f"{stem or '_'}.safetensors"


def plain(token: str) -> str:
    """A token's name without brackets or the mark of a word's end."""
    return re.sub(r"^[\[<]|[\]>]$|</w>$", "", token)


def placeholder(token: str) -> str:
    """What a prompt calls a token."""
    return token if is_new(token) else plain(token)


def rows_of(lora: Lora) -> Iterator[tuple[str, Tensor]]:
    """Each trained token and its row (D,)."""
    return zip(lora.tokens, lora.token_initial + lora.token_delta if lora.tokens else (), strict=True)


def named_files(tensors: Mapping[str, dict[str, Tensor]]) -> Files:
    """The files of embeddings, whose tensors are given for each token.

    Raises LoraFileError where two tokens would have the same name, on any file system.
    """
    files: Files = {}
    taken: dict[str, str] = {}
    for token, own in tensors.items():
        name = file_name(token)
        if other := taken.get(name.casefold()):
            raise LoraFileError(
                f"the tokens {other} and {token} would both be the embedding {name}: our own format, lora, keeps "
                "tokens inside its file, under their whole names"
            )
        taken[name.casefold()] = token
        files[name] = own, {"token": token}
    return files


def embeddings_folder(path: Path) -> Path:
    """Where the tokens of a file go that cannot hold them: `dog.safetensors` -> `dog_embeddings`."""
    return path.with_name(f"{path.stem}_embeddings")


def files_beside(loras: Mapping[str, Lora], path: Path) -> dict[Path, tuple[dict[str, Tensor], dict[str, str]]]:
    """Each token of a pipeline's text encoders as an embedding, in the folder beside the file at `path`."""
    encoders = [name for name, lora in loras.items() if lora.tokens]
    tensors: dict[str, dict[str, Tensor]] = {}
    for encoder in encoders:
        for token, row in rows_of(loras[encoder]):
            name = OF_ENCODER[encoder] if len(encoders) > 1 else placeholder(token)
            tensors.setdefault(token, {})[name] = row[None]
    return {embeddings_folder(path) / name: file for name, file in named_files(tensors).items()}


# ---------------------------------------------------------------- reading


def is_embedding(tensors: Mapping[str, Any]) -> bool:
    names = [*tensors]
    return PICKLED in names or (bool(names) and {*names} <= {*OF_ENCODER.values()}) or (
        len(names) == 1 and getattr(tensors[names[0]], "ndim", 0) in (1, 2) and not re.search(r"\.|^lora", names[0])
    )  # fmt: skip


def from_embedding(
    tensors: Mapping[str, Any], about: Mapping[str, str], name: str, encoders: Sequence[str]
) -> dict[str, Lora]:
    """The tokens of an embedding for each of a pipeline's text encoders.

    Args:
        name: that of its file without a suffix.

    Raises:
        LoraFileError: it is for other text encoders.
    """
    rows = dict(tensors)
    if PICKLED in rows:
        name, rows = str(rows.get("name") or name), {ALONE: next(iter(rows[PICKLED].values()))}
    of_two = {encoder: rows[tensor] for encoder, tensor in OF_ENCODER.items() if tensor in rows}
    if len(of_two) > 1 or len(encoders) > 1:
        if len(encoders) < 2:
            raise LoraFileError(
                f"it is an embedding for the two text encoders of SDXL ({', '.join(rows)}); here is one"
            )
        if missing := [OF_ENCODER[encoder] for encoder in encoders if encoder not in of_two]:
            raise LoraFileError(
                f"it is an embedding of another model: {missing[0]} is not in it, and SDXL's have "
                f"{' and '.join(OF_ENCODER.values())}"
            )
        found = of_two
    else:
        ((own, tensor),) = rows.items()
        found = {encoders[0]: tensor}
        name = name if own in (ALONE, *OF_ENCODER.values()) else own
    return {encoder: with_rows(Lora({}), about.get("token", name), tensor) for encoder, tensor in found.items()}


def without_bundled(
    tensors: Mapping[str, Tensor], tokens: Sequence[str], encoders: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Lora]]:
    """The tensors of a LoRA without those of bundled embeddings, and the tokens that these are, by text encoder."""
    others: dict[str, Tensor] = {}
    bundles: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := _BUNDLED.fullmatch(name):
            own = ALONE if match["tensor"].startswith(PICKLED) else match["tensor"]
            bundles.setdefault(match["name"], {})[own] = tensor
        else:
            others[name] = tensor
    names, found = {placeholder(token): token for token in tokens}, {}
    for name, own in bundles.items():
        if unknown := own.keys() - {ALONE, *OF_ENCODER.values()} or not encoders:
            what = next(iter(unknown), "") if encoders else next(iter(own))
            raise LoraFileError(f"it holds bundle_emb.{name}.{what}, for which there is no text encoder here")
        add(found, from_embedding(own, {"token": names.get(name, name)}, name, encoders))
    return others, found


def with_tokens_beside(
    found: dict[str, Lora], path: Path, tokens: Sequence[str], encoders: Sequence[str]
) -> dict[str, Lora]:
    """The LoRAs of a file with the tokens that it names, where they were exported beside it."""
    for token in tokens if encoders else ():
        if any(token in lora.tokens for lora in found.values()):
            continue
        name = file_name(token)
        files = (embeddings_folder(path) / name, path.with_name(name))
        tensors = next((own for file in files if file.is_file() and is_embedding(own := read_tensors(file)[0])), None)
        if tensors is None:
            found.setdefault(encoders[0], Lora({})).missing_tokens.append(token)
        else:
            add(found, from_embedding(tensors, {"token": token}, path.stem, encoders))
    return found


def add(found: dict[str, Lora], tokens: Mapping[str, Lora]) -> None:
    """Add the tokens of an embedding to those of LoRAs, by text encoder."""
    for encoder, own in tokens.items():
        there = found.get(encoder, Lora({}))
        found[encoder] = there.with_tokens(own.tokens, own.token_initial, own.token_delta)


def with_rows(lora: Lora, name: str, rows: Tensor) -> Lora:
    """The LoRA with the token of an embedding (D,), or with a token for each of its vectors (T, D)."""
    rows = rows[None] if rows.dim() == 1 else rows
    if rows.dim() != 2:
        raise LoraFileError(f"the embedding {name} has the shape {tuple(rows.shape)}: (vectors, width) is needed")
    token = name if is_new(name) or name.endswith("</w>") else f"[{name}]"
    tokens = [token] + [f"{token[:-1]}.{i}{token[-1]}" for i in range(2, len(rows) + 1)]
    if tokens != [name]:
        logger.warning("The embedding %s is read where a prompt has %s", name, "".join(tokens))
    return lora.with_tokens(tokens, rows.float(), torch.zeros_like(rows, dtype=torch.float32))
