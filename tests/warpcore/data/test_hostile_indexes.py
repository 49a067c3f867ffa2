"""Indexes and manifests that others tampered with are recreated with a message, or refused by name."""

import json
import os
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bounds import bounded, fuzz
from tests.warpcore.data.tars import catalog_of, write_shard
from warpcore.data import bounded_parquet
from warpcore.data.buckets import Buckets
from warpcore.data.captions import CaptionGetter
from warpcore.data.filters import Filter
from warpcore.data.index import INDEX_SUFFIX, MANIFEST_NAME
from warpcore.data.plan import Plan
from warpcore.data.reader import Reader
from warpcore.errors import UserError

TARS, ROWS = 9, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A data set, its indexes and its manifest."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / ".cache"))
        for number in range(TARS):
            write_shard(folder / f"{number}.tar", ROWS, ROWS * number)
        catalog_of(folder)
        yield folder


def use(folder: Path) -> list[str]:
    """The captions of all that a plan draws of the data set, read as a run does."""
    catalog = catalog_of(folder)
    captions, wanted = CaptionGetter.parse(["txt", "identity"]), Filter.parse(["score", "lambda s: s >= 0"])
    buckets = Buckets.for_image_size(16, [], 8)
    plan = Plan(catalog, micro_batch_size=2, buckets=buckets, filters=[wanted], captions=captions)
    reader, drawn = Reader(captions=captions), plan.micro_batches()
    batches = [reader.__getitems__(next(drawn)) for _ in range(TARS * ROWS // 2)]
    return [caption for batch in batches for caption in batch.captions]


def put(path: Path, content: bytes) -> None:
    """As a copy that keeps its time of change would be: nothing remembers this one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def outcome(folder: Path, path: Path, content: bytes) -> str:
    """What using the data set comes to with this content in the place of one of its files."""
    told = ""
    kept = {file: file.read_bytes() for file in folder.glob("*.parquet")}
    if path.name.endswith(INDEX_SUFFIX):
        (folder / MANIFEST_NAME).unlink()
    try:
        put(path, content)
        with bounded(folder):
            assert len(use(folder)) == TARS * ROWS
    except UserError as error:
        told = str(error)
    finally:
        for file, before in kept.items():
            put(file, before)
    assert not told or str(folder) in told
    return told


NUMBERS = st.integers() | st.floats() | st.booleans() | st.none()
VALUES = st.recursive(NUMBERS | st.text(max_size=5), lambda some: st.lists(some, max_size=3) | st.dictionaries(
    st.text(max_size=3), some, max_size=3), max_leaves=5)  # fmt: skip
FILES = st.sampled_from([f"3.tar{INDEX_SUFFIX}", MANIFEST_NAME])


@fuzz(15)
@given(st.data(), FILES)
def test_changed_bytes_of_an_index_or_a_manifest_end_no_run_in_a_traceback(folder, data, name):
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1) | st.integers(len(content) - 60, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    kept = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    outcome(folder, folder / name, bytes(content[:kept]))


def with_metadata(path: Path, change) -> bytes:
    """A parquet file whose metadata are changed."""
    table = pq.read_table(path)
    ((key, text),) = ((k, v) for k, v in table.schema.metadata.items() if k.startswith(b"warpcore"))
    return written(table.replace_schema_metadata({key: change(text)}))


def written(table: pa.Table) -> bytes:
    content = pa.BufferOutputStream()
    pq.write_table(table, content, compression="zstd")
    return content.getvalue().to_pybytes()


@fuzz(15)
@given(st.data(), FILES)
def test_changed_metadata_of_an_index_or_a_manifest_end_no_run_in_a_traceback(folder, data, name):
    def change(text: bytes) -> bytes:
        saved = json.loads(text)
        owner = saved["summary"] if "summary" in saved and data.draw(st.booleans()) else saved
        key = data.draw(st.sampled_from(sorted(owner)))
        if data.draw(st.booleans()):
            owner[key] = data.draw(VALUES)
        else:
            del owner[key]
        return json.dumps(saved).encode()

    outcome(folder, folder / name, with_metadata(folder / name, change))


COLUMNS = st.sampled_from([pa.int8(), pa.int32(), pa.int64(), pa.float64(), pa.string(), pa.binary(), pa.bool_(),
                           pa.list_(pa.int64()), pa.list_(pa.string()), pa.null()])  # fmt: skip


@fuzz(15)
@given(st.data(), FILES)
def test_changed_columns_of_an_index_or_a_manifest_end_no_run_in_a_traceback(folder, data, name):
    table = pq.read_table(folder / name)
    place = data.draw(st.integers(0, table.num_columns - 1))
    field, what = table.schema.field(place), data.draw(st.sampled_from(["value", "type", "gone", "twice", "rows"]))
    if what == "gone":
        table = table.remove_column(place)
    elif what == "twice":
        table = table.append_column(field, table.column(place))
    elif what == "rows":
        table = table.slice(0, data.draw(st.integers(0, len(table))))
    else:
        kind = field.type if what == "value" else data.draw(COLUMNS)
        row = data.draw(st.integers(0, len(table) - 1))
        values = table.column(place).to_pylist() if what == "value" else [None] * len(table)
        values[row] = data.draw(values_of(kind))
        table = table.set_column(place, pa.field(field.name, kind), pa.array(values, kind))
    outcome(folder, folder / name, written(table))


def values_of(kind: pa.DataType) -> st.SearchStrategy:
    if pa.types.is_dictionary(kind):
        return values_of(kind.value_type)
    if pa.types.is_list(kind):
        return st.none() | st.lists(values_of(kind.value_type), max_size=4)
    if pa.types.is_integer(kind):
        limit = 2 ** (kind.bit_width - 1)
        return st.none() | st.integers(-limit, limit - 1) | st.integers(-2, 5000).map(lambda n: min(n, limit - 1))
    if pa.types.is_floating(kind):
        return st.none() | st.floats()
    if pa.types.is_boolean(kind):
        return st.none() | st.booleans()
    if pa.types.is_string(kind):
        return st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    return st.none() if pa.types.is_null(kind) else st.none() | st.binary(max_size=6)


@pytest.mark.parametrize(
    "text", [b"[" * 100_000, b"null", b"{}", b"\xff", b'{"version": 3, "size_bytes": ' + b"9" * 5000 + b"}"]
)
@pytest.mark.parametrize("name", [f"3.tar{INDEX_SUFFIX}", MANIFEST_NAME])
def test_metadata_that_are_no_object_are_written_again(folder, name, text):
    assert not outcome(folder, folder / name, with_metadata(folder / name, lambda _: text))


def test_a_manifest_that_lies_about_its_tars_is_refused_by_name(folder):
    table = pq.read_table(folder / MANIFEST_NAME)
    for column, value in (("rows", 2), ("rows", 400), ("content", "0" * 32)):
        values = [value if row == 3 else old for row, old in enumerate(table[column].to_pylist())]
        place = table.column_names.index(column)
        changed = table.set_column(place, table.schema.field(place), pa.array(values, table[column].type))
        told = outcome(folder, folder / MANIFEST_NAME, written(changed))
        assert f"3.tar holds other samples (4) than {MANIFEST_NAME} in {folder} says: remove that file" in told


def with_column(path: Path, name: str, values: pa.Array) -> bytes:
    table = pq.read_table(path)
    place = table.column_names.index(name)
    return written(table.set_column(place, table.schema.field(place), values))


def test_a_text_that_is_stored_once_and_stands_in_every_row_is_not_spelled_out(folder, caplog):
    path = folder / f"3.tar{INDEX_SUFFIX}"
    long = pa.DictionaryArray.from_arrays(pa.array([0] * ROWS, pa.int32()), ["x" * 270_000_000]).cast(pa.string())
    content = with_column(path, "problem", long)
    assert len(content) < 100_000
    assert not outcome(folder, path, content)
    assert f"{path} can't be read (with its column 'problem', 540 MB of text would be read at once" in caplog.text
    assert "the tar will be indexed again" in caplog.text


@pytest.mark.parametrize("name", [f"3.tar{INDEX_SUFFIX}", MANIFEST_NAME])
@pytest.mark.parametrize(
    ("end", "told"),
    [
        (struct.pack("<I", 2**30) + b"PAR1", "its description takes 1,074 MB"),
        (b"end", "it does not end as Parquet does"),
    ],
)
def test_a_long_description_of_an_index_is_not_read(folder, name, end, told, caplog):
    path = folder / name
    assert not outcome(folder, path, path.read_bytes()[:-8] + end)
    assert f"{path} can't be read ({told}" in caplog.text


@pytest.mark.parametrize("name", [f"3.tar{INDEX_SUFFIX}", MANIFEST_NAME])
def test_columns_are_read_up_to_a_bound(folder, name, monkeypatch, caplog):
    path = folder / name
    monkeypatch.setattr(bounded_parquet, "MAX_BYTES", 4000)
    column, row = ("problem", "x") if name != MANIFEST_NAME else ("etag", "y")
    table = pq.read_table(path)
    content = with_column(path, column, pa.array([row * 1500] * len(table), pa.string()))
    told = outcome(folder, path, content)
    assert f"{path} can't be read (with its column {column!r}, " in caplog.text
    assert not told


def test_a_tar_of_too_much_text_is_an_error_that_names_the_column(folder, monkeypatch):
    monkeypatch.setattr(bounded_parquet, "MAX_BYTES", 100)
    path = folder / f"3.tar{INDEX_SUFFIX}"
    told = outcome(folder, path, path.read_bytes())
    assert f"{INDEX_SUFFIX} can't be read (with its column 'key', " in told
    assert "the limit is 0 MB" in told


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize("name", [f"3.tar{INDEX_SUFFIX}", MANIFEST_NAME])
def test_what_is_no_file_in_the_place_of_an_index_is_passed_over(folder, tmp_path, name, kind, caplog):
    for number in range(TARS):
        os.link(folder / f"{number}.tar", tmp_path / f"{number}.tar")
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    elif kind == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with bounded(tmp_path.parent):
        assert len(use(tmp_path)) == TARS * ROWS
    assert f"{name} can't be read ({tmp_path / name} is a {kind}; a regular file is needed)" in caplog.text
