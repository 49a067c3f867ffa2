"""Text conditions of the few texts that a run from caches still needs: the empty one, and those that it draws."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.common.text_memory import TextConditions

FILE_NAME = "prompts.safetensors"
"""In the folder of a run."""


def prompt_features(
    file: Path, texts: Sequence[str], made_with: Mapping[str, str], open_encoder: Callable[[], TextConditions]
) -> dict[str, Tensor]:
    """The text conditions (N, ...) of `texts`, float32 on the CPU, by name: read from `file`, or encoded into it.

    Args:
        made_with: what the conditions depend on; a file that was made otherwise is written again.
        open_encoder: loads the text encoder, which is freed when this returns.
    """
    about = {"texts": json.dumps(list(texts)), **made_with}
    if file.is_file() and _said(file) == about:
        return load_file(file)
    encode = open_encoder()
    # Each by itself: what the encoder makes of a text may differ in the last bit between batches of other sizes.
    rows = [{name: value.float().cpu() for name, value in encode([text]).items()} for text in texts]
    features = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    if not any(value.is_meta for value in features.values()):
        aside = file.with_name(f".{file.name}.partial")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(features, aside, about)
        aside.replace(file)
    return features


def _said(file: Path) -> dict[str, str] | None:
    """What a file says that it was made with; None where it can't be read."""
    try:
        with safe_open(file, "pt") as opened:
            return opened.metadata()
    except (SafetensorError, OSError):
        return None
