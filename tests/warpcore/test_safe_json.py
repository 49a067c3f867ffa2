"""JSON of strangers is parsed in one place, in bounds of size and depth; safetensors are opened in one place too."""

import ast
import io
import json

import pytest

from tests.bounds import bounded
from tests.sources import calls, lines_found
from warpcore.errors import UserError
from warpcore.safe_json import (
    MAX_BRACKETS,
    MAX_JSON_BYTES,
    MAX_LEVELS,
    ExcessiveJsonError,
    load_json,
    parse_json,
    parse_object,
    read_object,
)

FOLDERS = ("families", "inference", "modules", "tools", "train", "warpcore")
PARSED_ELSEWHERE = {"warpcore/safe_json.py", "modules/clip_weights.py"}
"""The helper itself, and a network that knows nothing of it, which parses a few settings in a bounded header."""
OPENED_ELSEWHERE = {"modules/safetensors_files.py"}
"""The helper itself."""


def lists(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize("value", [{"a": [1, None, "é"]}, [], "[[" * 200, 3, [[]] * 200])
@pytest.mark.parametrize("kind", [str, bytes])
def test_values_are_those_of_json(value, kind):
    text = json.dumps(value)
    assert parse_json(text if kind is str else text.encode()) == value


@pytest.mark.parametrize("levels", [MAX_LEVELS + 1, 900, 100_000])
@pytest.mark.parametrize("kind", ["lists", "mappings", "beside others"])
def test_what_is_nested_too_deeply_is_refused(levels, kind, tmp_path):
    text = {
        "lists": lists(levels),
        "mappings": '{"a":' * levels + "1" + "}" * levels,
        "beside others": f"[1, [2], {lists(levels - 1)}]",
    }[kind]
    with bounded(tmp_path), pytest.raises(ExcessiveJsonError, match="nested too deeply"):
        parse_json(text)
    assert parse_json(lists(MAX_LEVELS))


@pytest.mark.parametrize("content", ["{", b"\xff", "9" * 5000, '"a', "nope"])
def test_what_is_no_json_is_one_error(content):
    with pytest.raises(ValueError, match=r"char|decode|digits|Expecting") as error:
        parse_json(content)
    assert not isinstance(error.value, ExcessiveJsonError)
    with pytest.raises(UserError, match=r"^the config cannot be read: "):
        parse_object(content, "the config")


def test_a_value_that_is_no_object_is_refused():
    with pytest.raises(UserError, match=r"^the config is no JSON object$"):
        parse_object("[]", "the config")


def test_no_more_of_a_file_is_held_than_its_limit():
    file = io.BytesIO(b" " * 100)
    with pytest.raises(ExcessiveJsonError, match="longer than 0 MiB"):
        load_json(file, max_bytes=10)
    assert file.tell() == 11


def test_a_file_without_an_end_is_refused(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    with bounded(tmp_path), pytest.raises(UserError, match=r"^the config cannot be read: it is longer than 32 MiB$"):
        read_object(tmp_path / "config.json", "the config")


@pytest.mark.parametrize(("part", "most"), [("[],", MAX_BRACKETS - 2), ('"é1",', MAX_JSON_BYTES // 5 - 1)])
def test_the_longest_texts_take_less_than_a_gibibyte(part, most, tmp_path):
    text = f"[{part * most}0]"
    with bounded(tmp_path):
        assert len(parse_json(text)) == most + 1
    with bounded(tmp_path), pytest.raises(ExcessiveJsonError, match=r"more than 2,097,152 lists|longer than 32 MiB"):
        parse_json(text + part * 4)


def imported(source: str, module: str) -> list[ast.ImportFrom]:
    """The lines that import names of a module."""
    tree = ast.walk(ast.parse(source))
    return [node for node in tree if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(module)]


def parses_json(source: str) -> list[int]:
    """The lines that parse JSON without the helper."""
    if "json" not in source:
        return []
    called = [call.lineno for call, name, owner in calls(source) if owner == "json" and name not in ("dump", "dumps")]
    return called + [node.lineno for node in imported(source, "json")]


def opens_safetensors(source: str) -> list[int]:
    """The lines that import what opens safetensors without the helper."""
    opening = {"safe_open", "load_file", "torch"}
    found = imported(source, "safetensors") if "safetensors" in source else []
    return [node.lineno for node in found if {one.name for one in node.names} & opening]


def test_json_is_parsed_in_one_place():
    assert not lines_found(FOLDERS, parses_json, but=PARSED_ELSEWHERE), "parse it with warpcore.safe_json"


def test_safetensors_are_opened_in_one_place():
    wanting = lines_found(FOLDERS, opens_safetensors, but=OPENED_ELSEWHERE)
    assert not wanting, "open them with modules.safetensors_files"


def test_the_checks_see_what_parses_and_opens():
    wrong = ["json.loads(a)", "json.load(a)", "from json import loads", "json.JSONDecoder()"]
    assert sorted(parses_json("\n".join(wrong))) == [1, 2, 3, 4]
    assert not parses_json("import json\nparse_json(a)\njson.dumps(a)\npickle.loads(a)")
    wrong = [
        "from safetensors import safe_open",
        "from safetensors.torch import load_file",
        "from safetensors import torch",
    ]
    assert opens_safetensors("\n".join(wrong)) == [1, 2, 3]
    assert not opens_safetensors("from safetensors import SafetensorError\nfrom safetensors.torch import save_file")
