"""Files and processes are read and written as UTF-8 by every part of the project, whatever the locale is."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sources import ROOT, calls, lines_found, mode_of_open
from warpcore.config import load_config, make_config
from warpcore.data.shards import resolve_sources
from warpcore.errors import UserError
from warpcore.text import EncodingError, read_text

FOLDERS = ("benchmarks", "families", "inference", "models", "modules", "tools", "train", "warpcore")
NO_FILES_OF_TEXT = ("tarfile", "os", "Image", "context")  # the last one: a decoder of PyAV
TEXT_MODE = re.compile(r"[rwax]t?\+?t?")


def calls_without_encoding(source: str) -> list[int]:
    """The lines of calls that would read or write text in the locale's encoding."""
    found = []
    for call, name, owner in calls(source):
        if owner in NO_FILES_OF_TEXT or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        is_text = name in ("read_text", "write_text") and owner is not None
        if name == "open":
            is_text = TEXT_MODE.fullmatch(mode_of_open(call, owner)) is not None
        as_text = [k.value for k in call.keywords if k.arg in ("text", "universal_newlines")]
        if is_text or any(getattr(value, "value", False) is True for value in as_text):
            found.append(call.lineno)
    return found


def test_every_text_file_is_opened_as_utf_8():
    assert not lines_found(FOLDERS, calls_without_encoding)


def test_the_check_sees_calls_without_an_encoding():
    wrong = ['Path("a").read_text()', 'open("a")', 'open("a", "w")', "p.open()", 'p.open("a")', "run(x, text=True)"]
    assert calls_without_encoding("\n".join(wrong)) == [1, 2, 3, 4, 5, 6]
    right = [
        "read_text(p)",
        'tarfile.open(p, "w")',
        'p.read_text(encoding="utf-8")',
        'open("a", "rb")',
        'p.open("wb")',
    ]
    assert not calls_without_encoding("\n".join([*right, "storage.open(url)", "Image.open(file)"]))


ENCODINGS = {"utf-8": "utf-8", "utf-8 with a mark": "utf-8-sig", "utf-16": "utf-16", "utf-16 big": "utf-16-be"}


@pytest.mark.parametrize("name", ENCODINGS)
def test_text_is_read_without_its_byte_order_mark(tmp_path, name):
    content = "naïve 日本\r\nsecond".encode(ENCODINGS[name])
    if name == "utf-16 big":
        content = b"\xfe\xff" + content
    (tmp_path / "file").write_bytes(content)
    assert read_text(tmp_path / "file") == "naïve 日本\nsecond"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("naïve".encode("latin-1"), r"prompts.txt is not UTF-8 text: byte 2 \(0xef\).*iconv -f WINDOWS-1252"),
        ("naive".encode("utf-16-le"), "prompts.txt is not text: character 1 is a zero.*iconv -f UTF-16LE"),
        (b"\xff\xfen", "prompts.txt is not UTF-16-LE text: byte 2"),
    ],
)
def test_text_of_another_encoding_is_named_with_its_first_byte_and_the_remedy(tmp_path, content, words):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(EncodingError, match=words):
        read_text(tmp_path / "prompts.txt")


def config(folder: Path, content: bytes) -> str:
    (folder / "config.yaml").write_bytes(content)
    return str(folder / "config.yaml")


def test_a_config_may_be_of_any_unicode_encoding(tmp_path):
    from tests.warpcore.tiny import TinyConfig

    text = f"experiment_id: ï\nupdates: 1\nbatch_size: 1\ncheckpoint_path: {tmp_path}\nwebdataset_path: x\n"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        assert load_config(TinyConfig, [config(tmp_path, text.encode(encoding))]).experiment_id == "ï"
    with pytest.raises(UserError, match=r"config\.yaml is not UTF-8 text: byte 15"):
        load_config(TinyConfig, [config(tmp_path, text.encode("latin-1"))])


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path):
    from families.cascade.text_to_image import CascadeTextToImageConfig

    settings = {"prompt_file": tmp_path / "prompts.txt", "generator_checkpoint_path": "stage_c.safetensors"}
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "prompts.txt").write_bytes("a naïve dog\n# a comment\na cat\n".encode(encoding))
        assert make_config(CascadeTextToImageConfig, settings).all_prompts == ["a naïve dog", "a cat"]
    (tmp_path / "prompts.txt").write_bytes("a naïve dog".encode("latin-1"))
    with pytest.raises(UserError, match=r"prompts\.txt is not UTF-8 text: byte 4"):
        _ = make_config(CascadeTextToImageConfig, settings).all_prompts


def test_a_list_of_tars_may_have_a_byte_order_mark(tmp_path):
    (tmp_path / "data.tar").write_bytes(bytes(1024))
    (tmp_path / "data.yml").write_text("- data.tar\n", encoding="utf-8-sig")
    (source,) = resolve_sources(str(tmp_path / "data.yml"))
    assert [shard.url for shard in source.shards] == [str(tmp_path / "data.tar")]
    (tmp_path / "data.yml").write_bytes(b"- \xef.tar\n")
    with pytest.raises(UserError, match=r"data\.yml is not UTF-8 text: byte 2"):
        resolve_sources(str(tmp_path / "data.yml"))


@pytest.mark.integration
def test_a_config_is_read_as_utf_8_where_the_locale_is_ascii(tmp_path):
    file = config(tmp_path, "seed: x\nexperiment_id: naïve\n".encode())
    ascii_only = {"PYTHONPATH": str(ROOT), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    ended = subprocess.run(
        [sys.executable, ROOT / "train/train_a.py", file], env=ascii_only, capture_output=True, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert b"seed: found 'x'" in ended.stderr
    assert b"Traceback" not in ended.stderr
