import io
import tarfile

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from warpcore.data.tar_headers import BLOCK_BYTES, MAX_EXTENDED_BYTES, Member, TarHeaderError, read_members
from warpcore.data.tars import BadShardError, read_samples

NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\n"), min_size=1, max_size=300)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE,
                         tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.CONTTYPE])  # fmt: skip
MEMBERS = st.lists(st.tuples(NAMES, KINDS, st.binary(max_size=1100), st.text("ab\u00e9", max_size=120)), max_size=6)


def written(members, form: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for name, kind, data, target in members:
            about = tarfile.TarInfo(name)
            about.type = kind
            if about.isreg():
                about.size = len(data)
            about.linkname = target if about.issym() or about.islnk() else ""
            about.mtime = 1.5 if form == tarfile.PAX_FORMAT else 1  # a pax record of its own
            tar.addfile(about, io.BytesIO(data) if about.isreg() else None)
    return content.getvalue()


def as_tarfile_reads(content: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(content), encoding="utf-8", errors="surrogateescape") as tar:
        return [
            Member(one.name, one.offset_data, one.size, not one.isreg(), one.sparse is not None)
            for one in tar if one.isreg() or one.issym() or one.islnk()
        ]  # fmt: skip


@given(MEMBERS, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
def test_members_are_those_that_tarfile_reads(members, form):
    content = written(members, form)
    assert list(read_members(io.BytesIO(content))) == as_tarfile_reads(content)


@given(st.lists(st.tuples(st.text("abc/d.", min_size=1, max_size=200), st.binary(max_size=600)), max_size=4))
def test_names_with_a_prefix_are_read(members):
    fitting = []
    for name, data in members:
        try:
            fitting.append((name, tarfile.REGTYPE, data, ""))
            content = written(fitting, tarfile.USTAR_FORMAT)
        except ValueError:  # too long for this form, or it can't be split at a slash
            fitting.pop()
    content = written(fitting, tarfile.USTAR_FORMAT)
    assert list(read_members(io.BytesIO(content))) == as_tarfile_reads(content)


def header(name: bytes, kind: bytes = b"0", size: bytes = b"00000000000\0") -> bytes:
    block = bytearray(BLOCK_BYTES)
    block[: len(name)], block[124:136], block[156:157], block[257:265] = name, size, kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base_256(size: int) -> bytes:
    return (size + (1 << 95)).to_bytes(12, "big") if size >= 0 else (size + (1 << 96)).to_bytes(12, "big")


@pytest.mark.parametrize(
    "content",
    [
        header(b"a.jpg", size=base_256(-512)),
        header(b"a.jpg", size=base_256(1 << 70)),
        header(b"x", b"x", b"%011o\0" % (MAX_EXTENDED_BYTES + 1)) + bytes(MAX_EXTENDED_BYTES + 1024),
        (header(b"L", b"L", b"%011o\0" % 3) + b"abc".ljust(BLOCK_BYTES, b"\0")) * 50,
        header(b"x", b"x", b"%011o\0" % 11) + b"11 size=-51".ljust(BLOCK_BYTES, b"\0") + header(b"a.jpg"),
        header(b"x", b"x", b"%011o\0" % 9) + b"999 a=bc\n".ljust(BLOCK_BYTES, b"\0") + header(b"a.jpg"),
        header(b"L", b"L", b"%011o\0" % 3) + b"abc".ljust(BLOCK_BYTES, b"\0"),
    ],
    ids=["negative size", "huge size", "huge pax header", "chain of names", "negative pax size", "pax length", "name"],
)
def test_hostile_headers_are_damage_told_with_file_and_byte(content):
    content += bytes(2 * BLOCK_BYTES)
    with pytest.raises(BadShardError, match=r"x\.tar is (damaged|not a tar|cut short).* byte \d+"):
        read_samples(io.BytesIO(content), "x.tar", len(content))


@pytest.mark.parametrize("major", ["0.0", "0.1", "1.0"])
def test_sparse_members_are_refused_by_name(major):
    records = {"GNU.sparse.size": "99", "GNU.sparse.map": "0,1", "GNU.sparse.major": "1"}
    key = dict(zip(("0.0", "0.1", "1.0"), records, strict=True))[major]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.PAX_FORMAT) as tar:
        about = tarfile.TarInfo("a.jpg")
        about.pax_headers = {key: records[key]}
        tar.addfile(about)
    content.seek(0)
    with pytest.raises(BadShardError, match=r"x\.tar: a\.jpg is stored sparsely"):
        read_samples(content, "x.tar", len(content.getvalue()))


@given(st.data())
@example(data=None)
def test_a_changed_byte_gives_members_or_damage_and_nothing_else(data):
    members = [("a.jpg", tarfile.REGTYPE, b"1" * 700, ""), ("\u00e9" * 150 + ".txt", tarfile.REGTYPE, b"2", "")]
    form = tarfile.PAX_FORMAT if data is None else data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
    content = bytearray(written(members, form))
    for _ in range(0 if data is None else data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    found, error = [], None
    try:
        found = list(read_members(io.BytesIO(bytes(content))))
    except TarHeaderError as raised:
        error = raised
    assert all(member.size >= 0 for member in found)
    assert error is None or (data is not None and 0 <= error.offset <= len(content) + BLOCK_BYTES)
