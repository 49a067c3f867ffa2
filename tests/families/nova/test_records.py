"""Folders of records are read as the reference does, and damaged ones are refused, whatever is wrong with them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from families.nova.imports import short_text
from families.nova.published_config import CAPTIONS
from families.nova.records import MAX_RECORD_BYTES, array_of, read_records
from tests.bounds import bounded, fuzz
from tests.golden import FOLDER
from tests.small_nova import load_nova
from warpcore.data.captions import CaptionGetter
from warpcore.errors import UserError

CALLS, _ = load_nova("records")
RECORDS = FOLDER / "nova"


def shown(value: Any) -> Any:
    """As the golden case writes it: bytes in hexadecimal."""
    if isinstance(value, dict):
        return {key: shown(part) for key, part in value.items()}
    return value.hex() if isinstance(value, bytes) else value


@pytest.mark.parametrize("name", CALLS)
def test_records_are_those_of_the_reference(name):
    call = CALLS[name]
    assert list(map(shown, read_records(RECORDS / call["folder"]))) == call["result"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return shutil.copytree(RECORDS / "records" / "one_file", tmp_path / "records")


def test_arrays_have_their_shapes_and_finite_numbers(folder):
    record = next(read_records(folder))
    values = array_of(record["moments"], record["shape"], "moments")
    assert values.shape == (8, 2, 3)
    assert values.dtype == np.float16
    assert array_of(b"", [], "texts").shape == (0,)
    for content, shape, match in (
        (record["moments"], [8, 2, 4], "of shape .* would have 128 bytes, and there are 96"),
        (record["moments"], [-8, -2, 3], "which no array has"),
        (b"", [0] * 9, "which no array has"),
        (b"\x00\x7c", [1], "not finite"),
    ):
        with pytest.raises(ValueError, match=match):
            array_of(content, shape, "moments")


def metadata(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "METADATA"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")

    return change


def cut(name: str, kept: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:kept])


def index(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "00000.index").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut("00000.data", 300), "00000.data is cut off: it has 300 bytes, and 00000.index a record that ends at 381"),
        (cut("00000.index", 14), "00000.index is cut off: its records end at 381, but 00000.data has 527 bytes"),
        (cut("METADATA", 20), "METADATA cannot be read"),
        (lambda folder: (folder / "METADATA").unlink(), "is no folder of records"),
        (lambda folder: (folder / "00000.data").unlink(), "belong together"),
        (lambda folder: (folder / "00000.index").unlink(), "holds 0 records, but METADATA says 3"),
        (metadata(entries=4), "holds 3 records, but METADATA says 4"),
        (metadata(version=2), "not that of a folder of records"),
        (metadata(features={"moments": "FLOAT64"}), "not that of a folder of records"),
        (metadata(features={"moments": "BYTES"}), "of which METADATA knows nothing"),
        (index("0 199\n5 182\n"), "a record at 5 of 182 bytes, where one of up to .* at 199"),
        (index(f"0 {MAX_RECORD_BYTES + 1}\n"), "is damaged"),
        (index("0 1e9\n"), "is not an offset and a size"),
    ],
)
def test_damaged_folders_say_what_is_wrong(folder, change, message):
    change(folder)
    with pytest.raises(UserError, match=message):
        list(read_records(folder))


def test_a_feature_that_is_lacking_or_of_another_type_is_named(folder):
    features = json.loads((folder / "METADATA").read_text(encoding="utf-8"))["features"]
    metadata(features=features | {"label": "INT64"})(folder)
    with pytest.raises(UserError, match=r"record 0 of .*00000.data is damaged: it lacks label"):
        list(read_records(folder))
    metadata(features=features | {"flow": "INT64"})(folder)
    with pytest.raises(UserError, match="it holds flow of another type than METADATA says, INT64"):
        list(read_records(folder))


def test_whatever_bytes_are_changed_the_records_are_read_or_refused(tmp_path):
    folder = shutil.copytree(RECORDS / "records" / "text_embeddings", tmp_path / "records")
    path = folder / "00000.data"
    whole = path.read_bytes()

    @fuzz(60)
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=6))
    def check(changes: list[tuple[int, int]]) -> None:
        content = bytearray(whole)
        for place, value in changes:
            content[place] = value
        path.write_bytes(content)
        with bounded(tmp_path):
            try:
                (record,) = read_records(folder)
            except UserError:
                return
        assert list(record) == ["moments", "shape", "caption", "text"]

    check()


def test_a_sample_is_trained_with_its_long_or_its_short_text_as_in_the_reference():
    calls, tensors = load_nova("captions")
    texts = [call for name, call in calls.items() if name.startswith("annotation") and "caption" in call["result"]
             ["draw_below_0.5"]]  # fmt: skip
    assert len(texts) > 8
    getter = CaptionGetter.parse(CAPTIONS)  # of which each draw has another one, half of the time the long text
    for call in texts:
        given = call["kwargs"]["inputs"]
        choices = getter.expression(given["caption"], short_text(given["caption"], given.get("text", "")))
        assert choices == [call["result"][key]["caption"] for key in ("draw_from_0.5", "draw_below_0.5")]
    call = calls["moments"]
    values = array_of(bytes.fromhex(call["kwargs"]["bytes_hex"]), call["kwargs"]["shape"], "moments")
    expected = tensors[call["result"]["tensor"]]
    assert torch.equal(torch.from_numpy(values.astype(np.float32)), expected)
