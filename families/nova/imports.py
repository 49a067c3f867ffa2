"""Records of the published caches of NOVA as samples of a training here."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.common.imported import ImportedRecord
from families.nova.records import METADATA, Record, array_of, read_records
from families.nova.training import MOMENTS, TEXT
from modules.nova_embeddings import DEFAULT_FPS
from warpcore.errors import UserError

NEEDED = ("moments", "shape")
"""What a record has in any case."""
ENCODED = {"data": bytes, "shape": list}
KINDS = {
    "moments": [bytes], "shape": [list], "caption": [str, ENCODED], "text": [str, ENCODED], "flow": [float, int],
    "label": [int],
}  # fmt: skip
"""What is read of a record, and of which type each may be."""
STATES = "states of a short text, beside those of a caption"

FIRST_SENTENCE = re.compile(r".*?[.!?](?=\s)")
"""A line break before its end ends the search."""


def imported_records(folder: Path) -> Iterator[ImportedRecord]:
    """The samples of a folder of records: moments; captions, or states of a text encoder; and fields.

    A sample's short text, which trainings take half of the time, is the field `text`; its motion score is `flow`.

    Raises:
        UserError: the folder is damaged, or its records lack moments.
    """
    for record in read_records(folder):
        if missing := [name for name in NEEDED if name not in record]:
            raise UserError(
                f"{folder / METADATA} has the features {', '.join(record)}, but {' and '.join(missing)} "
                "is missing: it is no cache of NOVA's moments"
            )
        if wrong := [name for name, kinds in KINDS.items() if name in record and _kind(record[name]) not in kinds]:
            raise UserError(
                f"{folder / METADATA} has {', '.join(wrong)} of another type than NOVA's caches, where moments are "
                "BYTES, shape [INT64], caption and text STRING, or states and their shape, flow FLOAT32, label INT64"
            )
        yield _sample(record)


def _kind(value: Any) -> Any:
    """The type of a value of a record; of a list of other things than whole numbers None."""
    if isinstance(value, dict):
        return {name: _kind(one) for name, one in value.items()}
    return type(value) if not isinstance(value, list) or all(isinstance(one, int) for one in value) else None


def _sample(record: Record) -> ImportedRecord:
    found = ImportedRecord(not_taken=[name for name in record if name not in KINDS])
    caption, text = record.get("caption"), record.get("text") or ""
    try:
        found.features[MOMENTS] = _moments(record)
        if isinstance(caption, dict):
            found.features[TEXT] = _states(caption)
        if not math.isfinite(record.get("flow", 0.0)):
            raise ValueError("its flow is not finite")
    except ValueError as error:
        return ImportedRecord(problem=str(error))
    if isinstance(text, dict):
        found.not_taken += [STATES] if text["data"] else []
        text = ""
    elif text and isinstance(caption, dict):
        found.not_taken.append("text, beside states of a caption")
    found.fps = DEFAULT_FPS if found.features[MOMENTS].shape[1] > 1 else 0.0
    fields = {name: record[name] for name in ("flow", "label") if name in record}
    if isinstance(caption, str):
        found.members["txt"] = caption.encode()
        fields["text"] = short_text(caption, text)
    if fields:
        found.members["json"] = json.dumps(fields, ensure_ascii=False).encode()
    return found


def short_text(caption: str, text: str = "") -> str:
    """The sample's own short text, else the first sentence of its caption, else the caption."""
    first = FIRST_SENTENCE.match(caption)
    return text or (first[0] if first else caption)


def _moments(record: Record) -> Tensor:
    """(2 C, T, h, w); of a picture T is 1."""
    moments = torch.from_numpy(array_of(record["moments"], record["shape"], "its moments").copy())
    if moments.dim() not in (3, 4):
        raise ValueError(f"its moments are of shape {list(moments.shape)}, neither of a picture nor of a clip")
    return moments if moments.dim() == 4 else moments[:, None]


def _states(said: dict[str, Any]) -> Tensor:
    """(L, D) of a text."""
    states = torch.from_numpy(array_of(said["data"], said["shape"], "the states of its caption").copy())
    if states.dim() != 2:
        raise ValueError(f"the states of its caption are of shape {list(states.shape)}, not (tokens, width)")
    return states
