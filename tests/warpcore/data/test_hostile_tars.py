"""Tars that others tampered with are indexed, or one line names the tar and the place."""

import io
import re
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bounds import bounded, fuzz
from tests.warpcore.data.tars import catalog_of, picture, write_tar
from tests.warpcore.data.test_tar_headers import base_256, header
from tools.index_dataset import main
from warpcore.data.buckets import Buckets
from warpcore.data.index import index_shard, read_rows
from warpcore.data.plan import Plan
from warpcore.data.shards import resolve_sources
from warpcore.data.tar_headers import BLOCK_BYTES
from warpcore.errors import UserError

END = bytes(2 * BLOCK_BYTES)
PICTURE = picture()


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK_BYTES)


def entry(name: bytes, content: bytes, kind: bytes = b"0", size: bytes | None = None) -> bytes:
    return header(name, kind, size or octal(len(content))) + padded(content)


def pax(*records: tuple[str, str]) -> bytes:
    text = b""
    for key, value in records:
        line = f" {key}={value}\n".encode()
        length = len(line) + 1
        while len(str(length)) + len(line) != length:
            length = len(str(length)) + len(line)
        text += str(length).encode() + line
    return entry(b"pax", text, b"x")


JPG = entry(b"a.jpg", PICTURE)
NAME = entry(b"././@LongLink", b"b" * 200 + b".jpg\0", b"L")
STRANGE = {
    "negative size": JPG + header(b"b.jpg", b"0", base_256(-512)) + END,
    "size of minus all": JPG + header(b"b.jpg", b"0", b"\xff" * 12) + END,
    "huge size": JPG + header(b"b.jpg", b"0", base_256(1 << 80)) + END,
    "size beyond the end": JPG + header(b"b.jpg", b"0", base_256(1 << 40)) + END,
    "size of letters": JPG + header(b"b.jpg", b"0", b"zzzzzzzzzzz\0") + END,
    "size of blanks": header(b"b.txt", b"0", b" " * 12) + JPG + END,
    "pax header of 200 kB": pax(("comment", "x" * 200_000)) + JPG + END,
    "pax header of many records": pax(*((f"k{number}", "v") for number in range(20_000))) + JPG + END,
    "pax header beyond a MiB": entry(b"pax", b"9 a=bbbb\n" * 130_000, b"x") + JPG + END,
    "pax size below zero": pax(("size", "-1")) + JPG + END,
    "pax size of 20 digits": pax(("size", "9" * 20)) + JPG + END,
    "pax size of words": pax(("size", "many")) + JPG + END,
    "pax size beyond the end": pax(("size", str(1 << 40))) + JPG + END,
    "pax length of zero": entry(b"pax", b"0 a=b\n", b"x") + JPG + END,
    "pax length of 5000 digits": entry(b"pax", b"9" * 5000 + b" a=b\n", b"x") + JPG + END,
    "pax length below zero": entry(b"pax", b"-6 a=b\n", b"x") + JPG + END,
    "pax length beyond": entry(b"pax", b"60 a=b\n", b"x") + JPG + END,
    "pax without key": entry(b"pax", b"5 =b\n", b"x") + JPG + END,
    "pax without end of line": entry(b"pax", b"6 a=bc", b"x") + JPG + END,
    "pax empty": entry(b"pax", b"", b"x") + JPG + END,
    "pax no UTF-8": entry(b"pax", b"11 path=\xff\xfe\n", b"x") + JPG + END,
    "pax path with a zero": pax(("path", "a\0.jpg")) + JPG + END,
    "pax for nobody": JPG + pax(("path", "c.jpg")) + END,
    "pax sparse 0.0": pax(("GNU.sparse.size", "9"), ("GNU.sparse.numblocks", "1")) + JPG + END,
    "pax sparse 0.1": pax(("GNU.sparse.map", "0,1"), ("GNU.sparse.size", "9")) + JPG + END,
    "pax sparse 1.0": pax(("GNU.sparse.major", "1"), ("GNU.sparse.minor", "0"), ("GNU.sparse.name", "c.jpg"),
                          ("GNU.sparse.realsize", "9")) + entry(b"c.jpg", b"x\n") + END,
    "pax sparse of nonsense": pax(("GNU.sparse.major", "x"), ("GNU.sparse.realsize", "-")) + JPG + END,
    "GNU sparse": JPG + entry(b"c.jpg", b"x" * 512, b"S") + END,
    "global pax": entry(b"pax", b"9 size=1\n", b"g") + JPG + END,
    "global pax cut": entry(b"pax", b"x" * 100, b"g")[:-400],
    "chain of long names": JPG + NAME * 5000 + JPG + END,
    "chain of long links": JPG + entry(b"././@LongLink", b"b" * 200, b"K") * 5000 + JPG + END,
    "chain of pax headers": JPG + pax(("path", "c.jpg")) * 5000 + JPG + END,
    "long name below zero": JPG + header(b"././@LongLink", b"L", base_256(-1)) + END,
    "long name of a GiB": JPG + header(b"././@LongLink", b"L", octal(1 << 30)) + END,
    "long name for nobody": JPG + NAME + END,
    "long name cut": JPG + NAME[:BLOCK_BYTES + 10],
    "long name empty": JPG + entry(b"././@LongLink", b"", b"L") + JPG + END,
    "long name of a device": NAME + header(b"b", b"3") + JPG + END,
    "name with a line feed": JPG + entry(b"b\nc.jpg", PICTURE) + END,
    "name no UTF-8": JPG + entry(b"\xff\xfe.jpg", PICTURE) + END,
    "name empty": JPG + entry(b"", PICTURE) + END,
    "name upwards": JPG + entry(b"../../b.jpg", PICTURE) + END,
    "kind unknown": JPG + entry(b"b.jpg", PICTURE, b"Z") + END,
    "kind not ASCII": JPG + entry(b"b.jpg", PICTURE, b"\xff") + END,
    "device": JPG + header(b"b.jpg", b"3") + END,
    "pipe with a size": JPG + header(b"b.jpg", b"6", octal(1 << 30)) + END,
    "link to itself": JPG + header(b"b.jpg", b"2") + END,
    "hard link with a size": JPG + header(b"b.jpg", b"1", octal(1 << 30)) + END,
    "folder with a size": JPG + header(b"b", b"5", octal(1 << 30)) + END,
    "volume label": header(b"label", b"V") + JPG + END,
    "multi-volume": JPG + entry(b"b.jpg", PICTURE, b"M") + END,
    "checksum wrong": JPG + header(b"b.jpg").replace(b"b.jpg", b"c.jpg") + END,
    "no end": JPG,
    "half an end": JPG + bytes(100),
    "behind the end": JPG + END + JPG + END,
    "zeros alone": bytes(10 * BLOCK_BYTES),
    "zeros first": END + JPG + END,
    "text": b"these are words " * 200,
    "one byte": b"x",
    "deep json": JPG + entry(b"a.json", b"[" * 100_000) + END,
    "json of 5000 digits": JPG + entry(b"a.json", b'{"a": ' + b"9" * 5000 + b"}") + END,
    "json of surrogates": JPG + entry(b"a.json", b'{"\\ud800": "\\udfff", "b": 1e999}') + END,
    "facts of a huge picture": JPG + entry(b"b.picture.json", b'{"width": 1%s, "height": 1}' % (b"0" * 30)) + END,
    "facts of nothing": JPG + entry(b"b.picture.json", b'{"width": 0, "height": -1}') + END,
    "facts of truth": JPG + entry(b"b.picture.json", b'{"width": true, "height": true}') + END,
    "facts of surrogates": JPG + entry(b"b.picture.json", b'{"width": 1, "height": 1, "problem": "\\ud800"}') + END,
    "picture without width": JPG + entry(b"b.qoi", b"qoif" + bytes(8) + b"\3\0" + bytes(100)) + END,
    "long text": JPG + entry(b"a.txt", bytes(20 << 20)) + END,
    "long json": JPG + entry(b"a.json", b"[" + b"{}," * (8 << 20) + b"1]") + END,
    "20,000 members of one key": JPG + b"".join(header(b"a.%d" % number) for number in range(20_000)) + END,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """What libraries allocate once, however good the tar is."""
    catalog_of(write_tar(tmp_path_factory.mktemp("warm") / "good.tar", [("a.jpg", PICTURE)]))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def index(folder: Path, content: bytes) -> str:
    """What is told of a tar that can't be used; nothing where it can."""
    path = folder / "x.tar"
    path.write_bytes(content)
    with bounded(folder):
        try:
            ((shard,),) = (source.shards for source in resolve_sources(str(path)))
            index_shard(shard)
            read_rows(shard)
        except UserError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("name", STRANGE)
def test_a_strange_tar_is_indexed_or_named_in_one_line(tmp_path, name):
    told = index(tmp_path, STRANGE[name])
    assert not told or re.match(rf"{tmp_path}/x\.tar\b.*", told)
    assert "\n" not in told


TOLD_BY_BYTE = ("negative", "huge", "pax size", "pax length", "chain", "long name below", "long name of a GiB")


def test_a_picture_with_a_long_text_is_left_out_counted_and_named(tmp_path):
    (tmp_path / "x.tar").write_bytes(STRANGE["long text"][: -len(END)] + entry(b"b.jpg", picture(24)) + END)
    buckets = Buckets.for_image_size(64, [], 32)
    told = str(Plan(catalog_of(tmp_path / "x.tar"), micro_batch_size=1, buckets=buckets).survey)
    assert "1 of 2 rows can be drawn; 1 rejected: a text of more than 16 MiB" in told
    assert "a.txt" in told


DAMAGED = [name for name in STRANGE if name.startswith(TOLD_BY_BYTE)]


@pytest.mark.parametrize("name", DAMAGED)
def test_of_a_damaged_header_the_byte_is_told(tmp_path, name):
    assert re.search(r"at byte \d+|end at byte \d+", index(tmp_path, STRANGE[name]))


@pytest.mark.integration
def test_the_tool_names_every_strange_tar_and_goes_on(tmp_path, capsys):
    write_tar(tmp_path / "good.tar", [("a.jpg", PICTURE)])
    wrong = ["negative size", "chain of long names", "pax sparse 1.0", "pax size below zero", "text"]
    for number, name in enumerate(wrong):
        (tmp_path / f"{number}.tar").write_bytes(STRANGE[name])
    with pytest.raises(UserError) as error:
        main([str(tmp_path), "--workers", "1"])
    first, *lines = str(error.value).splitlines()
    assert first == "5 tars can't be used:"
    assert [line.split(".tar")[0] for line in lines] == [str(tmp_path / str(number)) for number in range(5)]
    assert "1 samples" in capsys.readouterr().out


def small_tar(form: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form) as tar:
        for name, data in (("a.jpg", PICTURE), ("\u00e9" * 120 + ".json", b'{"s": 1}'), ("a.txt", b"a dog")):
            about = tarfile.TarInfo(name)
            about.size, about.mtime = len(data), 1.5
            tar.addfile(about, io.BytesIO(data))
    return content.getvalue()


SMALL = [small_tar(form) for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)]
FIELDS = {"name": (0, 100), "size": (124, 12), "kind": (156, 1), "magic": (257, 8), "prefix": (345, 155)}


def with_checksum(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@fuzz(60)
@given(st.data())
def test_changed_headers_with_right_checksums_are_indexed_or_named(tmp_path_factory, data):
    content = bytearray(data.draw(st.sampled_from(SMALL)))
    for _ in range(data.draw(st.integers(1, 3))):
        start = BLOCK_BYTES * data.draw(st.integers(0, len(content) // BLOCK_BYTES - 1))
        block = content[start : start + BLOCK_BYTES]
        place, length = FIELDS[data.draw(st.sampled_from(sorted(FIELDS)))]
        size = st.integers(-(1 << 90), 1 << 90).map(base_256) | st.integers(0, 1 << 32).map(octal)
        new = data.draw(
            st.binary(max_size=length) | (size if length == 12 else st.sampled_from([b"L", b"x", b"S", b"g"]))
        )
        block[place : place + len(new)] = new
        content[start : start + BLOCK_BYTES] = with_checksum(block)
    kept = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    folder = tmp_path_factory.mktemp("tars")
    told = index(folder, bytes(content[:kept]))
    assert not told or told.startswith(f"{folder}/x.tar")
