"""Metadata of pictures: formats and columns that are read, names from other systems, and lines that are unusable."""

import csv
import datetime
import decimal
import io
import json
import unicodedata
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bounds import bounded, fuzz
from tests.tools.test_build_dataset import samples_of
from tests.warpcore.data.tars import picture
from tools.build_dataset import Report, build_dataset
from tools.metadata import NOT_IN_FOLDER, Metadata, read_metadata
from warpcore.data import bounded_parquet
from warpcore.data.picture_files import LeftOut
from warpcore.errors import UserError

DEEP = b"[" * 100_000 + b"]" * 100_000
POINTS = [1, 2, 1] * 18


def build(folder: Path, files: dict[str, bytes], **options) -> tuple[dict[str, dict], Report]:
    """The samples of a folder of these files, as webdataset reads them, and the report."""
    for name, content in files.items():
        (folder / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "pictures" / name).write_bytes(content)
    report = build_dataset(folder / "pictures", folder / "out", **options)
    return samples_of(folder / "out"), report


def jsonl(**line) -> bytes:
    return json.dumps(line).encode()


def _line(content: bytes) -> dict[str, bytes]:
    return {"metadata.jsonl": b'{"file_name": %s}' % content}


def _pose(points: list, **fields) -> bytes:
    return json.dumps({"people": [{"pose_keypoints_2d": points}]} | fields).encode()


def write_parquet(path: Path, columns: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("beside", [True, False])
def test_metadata_are_read_from_parquet(tmp_path, beside):
    columns = {
        "file_name": ["a.jpg", "b.jpg", "gone.jpg"],
        "caption": ["a bear", None, "x"],
        "score": [2.5, 3.0, 1.0],
        "taken": [datetime.datetime(2026, 1, 2, 3, 4, 5, 6)] * 3,
        "price": [decimal.Decimal("1.5")] * 3,
        "tags": [["x", "y"], [], None],
        "preview": [b"\xff"] * 3,
    }
    path = write_parquet(tmp_path / ("pictures" if beside else "") / "metadata.parquet", columns)
    given = {} if beside else {"metadata": path}
    samples, report = build(tmp_path, {"a.jpg": picture(), "b.jpg": picture()}, **given)
    assert samples["a"]["txt"] == b"a bear"
    assert "txt" not in samples["b"]
    fields = {"score": 2.5, "taken": "2026-01-02 03:04:05.000006", "price": 1.5, "tags": ["x", "y"]}
    assert json.loads(samples["a"]["json"]) == fields
    assert report.left_out.files == {"in the metadata but not in the folder": ["gone.jpg"]}
    assert "columns of the metadata that hold bytes (or codes inside of lists) are left out: preview" in str(report)


def test_tabs_and_other_names_of_json_lines_are_read(tmp_path):
    lines = {
        "a.tsv": b"file_name\ttext\na.jpg\ta bear, brown\n",
        "a.json": jsonl(file_name="a.jpg", text="a bear, brown"),
    }
    for name, content in lines.items():
        (tmp_path / name).write_bytes(content)
        samples, _ = build(tmp_path, {"a.jpg": picture()}, metadata=tmp_path / name, overwrite=True)
        assert samples["a"]["txt"] == b"a bear, brown"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.xlsx", b"", r"x\.xlsx: read are \.jsonl \(a JSON object in each line\), \.csv, \.tsv and \.parquet"),
        ("x", b"", "read are"),
        ("x.parquet", b"file_name,text", "x.parquet is no Parquet that can be read: "),
        ("x.parquet", b"", "x.parquet is no Parquet that can be read: "),
    ],
)
def test_what_is_read_is_said_where_a_file_is_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        build(tmp_path, {"a.jpg": picture()}, metadata=tmp_path / name)
    assert "iconv" not in str(raised.value)


def test_the_report_says_which_column_the_captions_are_from(tmp_path):
    lines = [
        jsonl(file_name="a.jpg", prompt="a prompt", caption="a caption", text="a text", description="it is long"),
        jsonl(file_name="b.jpg", prompt="a prompt", caption="a caption"),
        jsonl(file_name="c.jpg", description="it is long", prompt="a prompt"),
        jsonl(file_name="d.jpg", description="it is long"),
        jsonl(file_name="e.jpg", prompt="a prompt"),
    ]
    files = {f"{name}.jpg": picture() for name in "abcde"} | {"metadata.jsonl": b"\n".join(lines)}
    samples, report = build(tmp_path, files)
    taken = [samples[name]["txt"] for name in "abcde"]
    assert taken == [b"a text", b"a caption", b"a prompt", b"it is long", b"a prompt"]
    assert json.loads(samples["b"]["json"]) == {"prompt": "a prompt"}
    assert (
        "captions in the metadata: 2 from the column 'prompt', 1 from the column 'text', 1 from the column 'caption', "
        "1 from the column 'description'; kept as a field: 'caption', 'description', 'prompt'\n" in str(report)
    )


def test_lines_that_repeat_a_picture_are_told(tmp_path):
    lines = b"file_name,text\na.jpg,a bear\nb.jpg,a cat\na.jpg,a brown bear\n"
    samples, report = build(tmp_path, {"a.jpg": picture(), "b.jpg": picture(), "metadata.csv": lines})
    assert samples["a"]["txt"] == b"a brown bear"
    assert "1 line of the metadata came after one on the same picture: only the last one counts" in str(report)


def test_only_numbers_of_a_csv_become_numbers(tmp_path):
    lines = b"file_name,score,series\na.jpg,5.5,20_10\n"
    samples, report = build(tmp_path, {"a.jpg": picture(), "metadata.csv": lines})
    assert json.loads(samples["a"]["json"]) == {"score": 5.5, "series": "20_10"}
    assert "came after one" not in str(report)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_that_another_system_wrote_lead_to_their_files(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    name = unicodedata.normalize(form, "été/café.jpg")
    names = [unicodedata.normalize(other, name), name.replace("/", "\\"), name.upper(), f".\\{name}", f"x\\..\\{name}"]
    for number, written in enumerate(names):
        files = {name: picture(), "metadata.jsonl": jsonl(file_name=written, text="a cup")}
        samples, report = build(tmp_path / str(number), files)
        assert [sample["txt"] for sample in samples.values()] == [b"a cup"], written
        assert not report.left_out


def test_a_name_that_may_mean_two_files_leads_to_none(tmp_path):
    files = {"a.jpg": picture(), "A.jpg": picture(), "metadata.jsonl": jsonl(file_name="a.JPG", text="x")}
    _, report = build(tmp_path, files)
    assert report.left_out.files == {"in the metadata but not in the folder": ["a.JPG"]}
    files["metadata.jsonl"] = jsonl(file_name="A.jpg", text="x")
    samples, report = build(tmp_path, files, overwrite=True)
    assert not report.left_out
    assert "txt" in samples["A"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_files_beside_a_picture_belong_to_it_however_accents_are_written(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    files = {f"{unicodedata.normalize(other, 'café')}.{kind}": b"{}" for kind in ("txt", "json")}
    samples, report = build(tmp_path, {f"{unicodedata.normalize(form, 'café')}.jpg": picture()} | files)
    assert [(sample["txt"], sample["json"]) for sample in samples.values()] == [(b"{}", b"{}")]
    assert not report.left_out


@pytest.mark.parametrize(
    ("files", "reason", "name"),
    [
        ({"b.json": DEEP}, ".json is nested too deeply", "b.jpg"),
        ({"b.pose.json": DEEP}, "its .pose.json can't be used", "b.jpg"),
        ({"b.pose.json": _pose(POINTS, canvas_width=0)}, "its .pose.json can't be used", "b.jpg"),
        ({"b.pose.json": _pose([9e99, *POINTS[1:]])}, "its .pose.json can't be used", "b.jpg"),
        ({"b.pose.json": _pose([10**400])}, "its .pose.json can't be used", "b.jpg"),
        (_line(b'"b.jpg", "text": "\\ud800"'), "caption holds the character zero or half", "b.jpg"),
        (_line(b'"b.jpg", "text": "x\\u0000"'), "caption holds the character zero or half", "b.jpg"),
        (_line(b'"\\ud800.jpg", "text": "x"'), NOT_IN_FOLDER, "\ud800.jpg"),
        (_line(b'"\\u0000.jpg", "text": "x"'), NOT_IN_FOLDER, "\0.jpg"),
        (_line(b'"%s.jpg"' % (b"x" * 9000)), NOT_IN_FOLDER, "(9004 characters)"),
        ({"metadata.jsonl": b'{"key": "\\u0000", "text": "x"}'}, NOT_IN_FOLDER, "\0"),
        ({"metadata.jsonl": b'{"key": "%s"}' % (b"x" * 9000)}, NOT_IN_FOLDER, "(9000 characters)"),
    ],
)
def test_what_one_picture_or_line_has_wrong_is_named_and_the_rest_is_built(tmp_path, files, reason, name):
    samples, report = build(tmp_path, {"a.jpg": picture(), "b.jpg": picture()} | files)
    assert "a" in samples
    [(told, [named])] = report.left_out.files.items()
    assert reason in told
    assert name in named
    assert len(samples) == (1 if named == "b.jpg" else 2)
    str(report).encode()


@pytest.mark.parametrize(
    ("name", "lines", "kind", "place"),
    [
        ("metadata.jsonl", ["{", "{}]", '{"file_name": }'], "that is not JSON", 2),
        ("metadata.jsonl", ['{"file_name": "b.jpg", "x": ' + "9" * 5000 + "}"], "that is not JSON", 2),
        ("metadata.jsonl", ['{"file_name": "b.jpg", "x": ' + DEEP.decode() + "}"], "that is nested too deeply", 2),
        ("metadata.jsonl", ['["b.jpg", "x"]', "5", "null"], "that is no JSON object", 2),
        ("metadata.jsonl", ['{"text": "x"}', '{"file_name": "", "key": 5}', "{}"], "without a file name", 2),
        ("metadata.jsonl", ['{"file_name": 5}', '{"file_name": ["b.jpg"]}'], "whose file name is not text", 2),
        ("metadata.jsonl", ['{"file_name": "b.jpg", "text": ["x"]}'], "whose caption is not text", 2),
        ("metadata.csv", ["b.jpg,a dog, running", "b.jpg,x,,,"], "with more values than columns", 3),
        ("metadata.csv", [",a dog", '"",""'], "without a file name", 3),
    ],
)
def test_lines_of_metadata_that_cannot_be_used_are_counted_and_named(tmp_path, name, lines, kind, place):
    good = {
        "metadata.jsonl": ['{"file_name": "a.jpg", "text": "a bear"}'],
        "metadata.csv": ["file_name,text", "a.jpg,a bear"],
    }
    content = "\n".join([*good[name], *lines, ""]).encode()
    samples, report = build(tmp_path, {"a.jpg": picture(), "b.jpg": picture(), name: content})
    assert samples["a"]["txt"] == b"a bear"
    assert "txt" not in samples["b"]
    places = report.left_out.files[f"a line of metadata {kind}"]
    assert places[0] == f"{tmp_path / 'pictures' / name}, line {place}"
    assert sum(map(len, report.left_out.files.values())) == len(lines)
    assert f"{len(places)} a line of metadata {kind}: {places[0]}" in str(report)


def test_rows_of_parquet_whose_values_have_other_types_are_counted_and_named(tmp_path):
    names = pa.array(["a.jpg", "b.jpg", None])
    columns = {"file_name": names, "text": [["a bear"], None, ["x"]], "caption": ["a bear", "a dog", "x"]}
    files = {"a.jpg": picture(), "b.jpg": picture()}
    path = write_parquet(tmp_path / "x.parquet", columns)
    samples, report = build(tmp_path, files, metadata=path)
    assert "txt" not in samples["a"]
    assert samples["b"]["txt"] == b"a dog"
    assert report.left_out.files == {
        "a line of metadata whose caption is not text": [f"{path}, line 1"],
        "a line of metadata without a file name": [f"{path}, line 3"],
    }


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"file_name": [5, 6]}, "the file name is not text but 5"),
        ({"file_name": ["a.jpg", "b.jpg"], "text": [5, 6]}, "the caption is not text but 5"),
        ({"file_name": pa.array([None], pa.string()), "text": ["x"]}, "no file_name; it has: text"),
    ],
)
def test_a_column_of_another_type_is_an_error(tmp_path, columns, problem):
    path = write_parquet(tmp_path / "x.parquet", columns)
    with pytest.raises(UserError, match=f"x.parquet, line 1: {problem}"):
        build(tmp_path, {"a.jpg": picture(), "b.jpg": picture()}, metadata=path)


def _alike(kind: str) -> pa.Array:
    """A text of 200 kB in 40 rows, which a Parquet file holds once."""
    words, indices = pa.array(["x" * 200_000]), pa.array([0] * 40, pa.int32())
    if kind == "dictionary":
        return pa.DictionaryArray.from_arrays(indices, words)
    if kind == "list":
        return pa.ListArray.from_arrays(list(range(41)), words.take(indices))
    if kind == "lists of structs":
        return pa.ListArray.from_arrays(list(range(41)), pa.StructArray.from_arrays([words.take(indices)], ["x"]))
    if kind == "struct":
        return pa.StructArray.from_arrays([words.take(indices), pa.array([1] * 40)], ["x", "y"])
    return words.take(indices).cast(kind)


@pytest.mark.parametrize("kind", ["string", "large_string", "list", "struct", "lists of structs", "dictionary"])
def test_a_text_that_parquet_stores_once_takes_no_memory_in_every_row(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(bounded_parquet, "MAX_BYTES", 2**22)
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture())
    path, found = write_parquet(tmp_path / "x.parquet", {"file_name": ["a.jpg"] * 40, "more": _alike(kind)}), None
    assert path.stat().st_size < 30_000
    with bounded(tmp_path), suppress(UserError):
        found = read_metadata(folder, [folder / "a.jpg"], LeftOut(), path)
    assert (found is not None) == (kind == "dictionary")


def test_a_struct_of_many_numbers_is_counted_with_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(bounded_parquet, "MAX_BYTES", 2**20)
    (folder := tmp_path / "pictures").mkdir()
    (folder / "a.jpg").write_bytes(picture())
    many = pa.StructArray.from_arrays([pa.array([0] * 1000)] * 200, [f"field {number}" for number in range(200)])
    path = write_parquet(tmp_path / "x.parquet", {"file_name": ["a.jpg"] * 1000, "more": many})
    with pytest.raises(UserError, match="with its column 'more', 2 MB of values would be read at once"):
        read_metadata(folder, [folder / "a.jpg"], LeftOut(), path)


def test_a_long_row_group_and_words_of_a_dictionary_are_read(tmp_path):
    columns = {
        "file_name": [f"{number}.jpg" for number in range(3000)],
        "text": pa.array([f"text {number % 7}" for number in range(3000)]).dictionary_encode(),
        "words": [["a", f"b{number}"] for number in range(3000)],
        "who": [{"name": f"n{number}"} for number in range(3000)],
    }
    folder = tmp_path / "pictures"
    folder.mkdir()
    files = [folder / name for name in columns["file_name"]]
    for file in files:
        file.touch()
    found = read_metadata(folder, files, LeftOut(), write_parquet(tmp_path / "x.parquet", columns)).lines
    assert found[files[2999]] == {"text": "text 3", "words": ["a", "b2999"], "who": {"name": "n2999"}}
    assert len(found) == 3000


def test_durations_and_other_types_of_parquet_are_fields(tmp_path):
    columns = {
        "file_name": ["a.jpg"],
        "length": [datetime.timedelta(seconds=90)],
        "taken": [datetime.time(1, 2, 3)],
        "place": [{"when": datetime.date(2026, 1, 2)}],
    }
    path = write_parquet(tmp_path / "x.parquet", columns)
    samples, _ = build(tmp_path, {"a.jpg": picture()}, metadata=path)
    fields = {"length": "0:01:30", "taken": "01:02:03.000000", "place": {"when": "2026-01-02"}}
    assert json.loads(samples["a"]["json"]) == fields


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.tsv"])
def test_metadata_that_are_given_and_hold_no_line_are_an_error(tmp_path, name):
    (tmp_path / name).write_text("" if name == "x.jsonl" else "file_name,text\n")
    with pytest.raises(UserError, match=f"--metadata .*{name}: it has no line; read are .jsonl"):
        build(tmp_path, {"a.jpg": picture()}, metadata=tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_fields_with_half_a_character_are_kept(tmp_path):
    files = {"a.jpg": picture(), "metadata.jsonl": b'{"file_name": "a.jpg", "text": "x", "note": "\\ud83d"}'}
    samples, report = build(tmp_path, files)
    assert json.loads(samples["a"]["json"]) == {"note": "\ud83d"}
    assert not report.left_out


_TEXTS = st.text(max_size=12) | st.sampled_from(
    ["a.jpg", "..", "/", "\\", "\ud800", "\0", "x" * 300, "", "nan", "1e999"]
)
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(_TEXTS, inner, max_size=2),
    max_leaves=4,
)
_COLUMNS = st.sampled_from(["file_name", "key", "text", "caption", "image", "score"]) | _TEXTS
_LINES = st.lists(st.dictionaries(_COLUMNS, _VALUES, max_size=4), max_size=3)


@fuzz(100)
@given(lines=_LINES, kind=st.sampled_from([".jsonl", ".csv", ".parquet"]), damage=st.none() | st.integers(0, 400))
def test_metadata_of_anyone_are_read_or_explained(tmp_path_factory, lines, kind, damage):
    folder = tmp_path_factory.mktemp("metadata")
    (folder / "a.jpg").write_bytes(b"")
    path = folder / f"metadata{kind}"
    content = _written(lines, kind)
    path.write_bytes(content if damage is None else content[:damage] + b"\xff" + content[damage + 1 :])
    left_out, found = LeftOut(), Metadata()
    with bounded(folder), suppress(UserError):
        found = read_metadata(folder, [folder / "a.jpg", path], left_out)
    assert damage is not None or len(found.lines) + len(left_out) <= len(lines)
    str(left_out).encode()


def _written(lines: list[dict], kind: str) -> bytes:
    if kind == ".jsonl":
        return "\n".join(json.dumps(line) for line in lines).encode()
    columns = list(dict.fromkeys(name for line in lines for name in line))
    if kind == ".csv":
        rows = [columns, *([str(line.get(name, "")) for name in columns] for line in lines)]
        text = io.StringIO()
        csv.writer(text).writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")
    sink = pa.BufferOutputStream()
    whole = [name for name in columns if name.encode("utf-8", "ignore").decode() == name]
    texts = {name: [json.dumps(line.get(name)) for line in lines] for name in whole}
    pq.write_table(pa.table(texts), sink)
    return sink.getvalue().to_pybytes()
