"""Records of the published caches of NOVA as samples of a training here."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from families.common.imported import ImportedRecord
from families.nova.captions import short_text
from families.nova.records import METADATA, Record, array_of, read_records
from families.nova.training import MOMENTS, TEXT
from modules.nova_embeddings import DEFAULT_FPS
from warpcore.errors import UserError

NEEDED = ("moments", "shape")
"""What a record has in any case."""
KNOWN = (*NEEDED, "caption", "text", "flow", "label")
STATES = "states of a short text, beside those of a caption"


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
        yield _sample(record)


def _sample(record: Record) -> ImportedRecord:
    found = ImportedRecord(not_taken=[name for name in record if name not in KNOWN])
    caption, text = record.get("caption"), record.get("text") or ""
    try:
        found.features[MOMENTS] = _moments(record)
        if isinstance(caption, dict):
            found.features[TEXT] = _states(caption)
            found.not_taken += [STATES] if isinstance(text, dict) and text["data"] else []
    except ValueError as error:
        return ImportedRecord(problem=str(error))
    found.fps = DEFAULT_FPS if found.features[MOMENTS].shape[1] > 1 else 0.0
    fields = {name: record[name] for name in ("flow", "label") if name in record}
    if isinstance(caption, str):
        found.members["txt"] = caption.encode()
        fields["text"] = short_text(caption, text)
    if fields:
        found.members["json"] = json.dumps(fields, ensure_ascii=False).encode()
    return found


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
