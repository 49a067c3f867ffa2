"""Text conditions of the few texts that a run needs beside its captions: the empty one, and those that it draws.

`prompts.safetensors` in a cache of texts holds them, or in the folder of a run, where its caches lack some.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from families.common.features import stack_rows, take_row
from modules.safetensors_files import load_weights, open_weights
from warpcore.data.storage import storage_for
from warpcore.safe_json import parse_json
from warpcore.weights import disk_errors

logger = logging.getLogger(__name__)

FILE_NAME = "prompts.safetensors"
Encode = Callable[[Sequence[str]], dict[str, Tensor]]
"""Gives the text conditions (B, ...) of texts, by name."""
Rows = dict[str, dict[str, Tensor]]
"""The text conditions of each text, float32 on the CPU, by name."""


def prompt_features(
    file: Path,
    texts: Sequence[str],
    made_with: Mapping[str, str],
    open_encoder: Callable[[], Encode],
    known: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """The text conditions (N, ...) of `texts`, float32 on the CPU, by name: read from `file`, or encoded into it.

    Args:
        made_with: what the conditions depend on; a file that was made otherwise is written again.
        open_encoder: loads the text encoder, which is freed when this returns; called where a text is not `known`.
        known: the conditions of some texts, as `read_prompts` gives them.
    """
    about = {"texts": json.dumps(list(texts)), **made_with}
    if file.is_file() and _said(file) == about:
        return load_weights(file)
    lacking = [text for text in texts if text not in known]
    rows = {**known, **(encode_each(lacking, open_encoder()) if lacking else {})}
    features = stack_rows([rows[text] for text in texts])
    if lacking and not any(value.is_meta for value in features.values()):
        aside = file.with_name(f".{file.name}.partial")
        file.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(aside):
            save_file(features, aside, about)
        aside.replace(file)
    return features


def encode_each(texts: Sequence[str], encode: Encode) -> Rows:
    """The text conditions of each text, encoded by itself: batches of other sizes may differ in the last bit."""
    made = {text: take_row(encode([text]), 0) for text in texts}
    return {
        text: {name: value.float().cpu() if value.is_floating_point() else value.cpu() for name, value in row.items()}
        for text, row in made.items()
    }


def write_prompts(folder: str, rows: Mapping[str, Mapping[str, Tensor]], made_with: Mapping[str, str]) -> None:
    """Write the conditions of texts into a cache, given as a path or URL."""
    content = save(stack_rows(list(rows.values())), {"texts": json.dumps(list(rows)), **made_with})
    storage_for(folder).write(f"{folder}/{FILE_NAME}", content)


def read_prompts(folder: str, made_with: Mapping[str, str]) -> Rows:
    """The conditions of the texts that a cache holds; none where it holds none that were made so."""
    url = f"{folder}/{FILE_NAME}"
    try:
        with storage_for(url).open(url) as file:
            content = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    try:
        about = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        features = load(content)
        texts = parse_json(about.pop("texts"))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%.200s): its texts are encoded again", url, error)
        return {}
    if about != made_with:
        return {}
    fits = isinstance(texts, list) and all(value.ndim and len(value) == len(texts) for value in features.values())
    if not fits or not all(isinstance(text, str) for text in texts):
        logger.warning("%s is damaged (its texts are not those of its tensors): they are encoded again", url)
        return {}
    return {text: take_row(features, place) for place, text in enumerate(texts)}


def _said(file: Path) -> dict[str, str] | None:
    """What a file says that it was made with; None where it can't be read."""
    try:
        with open_weights(file) as opened:
            return opened.metadata()
    except (SafetensorError, OSError):
        return None
