"""Weights and LoRA files that anyone may have written: one clear error, in little time and memory."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from families.common.library_files import read_tensors, weights_files
from families.common.lora_files import read_loras, write_loras
from families.common.lora_formats import peft
from families.common.lora_formats.adapters import Adapter, Lora
from families.common.weight_files import read_header
from families.common.weights import with_weights
from tests.bounds import bounded, fuzz
from warpcore.errors import UserError


class Code:
    def __reduce__(self):
        return os.putenv, ("HOSTILE", "1")


PICKLED = {
    "a list": ([torch.ones(2)], "holds a list instead of tensors by name"),
    "a tensor": (torch.ones(2), "holds a Tensor instead"),
    "nothing": ({}, "holds no tensors by name"),
    "None": (None, "holds a NoneType"),
    "a number": (3, "holds a int"),
    "mappings": ({"model": {"weight": torch.ones(2)}}, "no tensors by name; there are mappings inside: model"),
    "a state that is none": ({"state_dict": 3}, "no tensors by name"),
    "numbers for names": ({3: torch.ones(2)}, "no tensors by name"),
    "code": (
        {"weight": torch.ones(2), "code": Code()},
        r"holds code beside tensors.* is never run; name the \.safete",
    ),
    "petabytes": ({"weight": torch.ones(1).expand(2**50)}, "for which the file holds too few numbers"),
    "a sparse tensor": ({"weight": torch.ones(2, 2).to_sparse()}, "weight is a sparse tensor"),
    "another kind": ({"weight": torch.ones(3, 2, dtype=torch.int8), "bias": torch.ones(3)}, "torch.int8 for weight"),
    "NaN": ({"weight": torch.ones(3, 2) * torch.nan, "bias": torch.ones(3)}, "weight holds NaN"),
}


def linear() -> nn.Module:
    return nn.Linear(2, 3)


@pytest.mark.parametrize("what", PICKLED)
def test_a_file_of_pytorch_that_holds_something_else_is_named(tmp_path, what):
    content, reason = PICKLED[what]
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    with bounded(tmp_path), pytest.raises(UserError, match=rf"generator: .*weights\.pt.*{reason}") as error:
        with_weights(linear, path, "generator")
    assert "weights_only" not in str(error.value)


def test_what_training_notes_beside_its_tensors_is_left_out(tmp_path):
    state = linear().state_dict()
    torch.save({"state_dict": state | {"step": 3}, "epoch": 2}, tmp_path / "weights.ckpt")
    network = with_weights(linear, tmp_path / "weights.ckpt", "generator")
    assert torch.equal(network.weight, state["weight"])


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{}", "lists no files"),
        ("[]", "is no JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"weight_map": {"a": 3}}', "lists no files"),
        ('{"weight_map": {"a": "../other.safetensors"}}', "lists '../other.safetensors', which is no file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "lists '/etc/passwd'"),
        ('{"weight_map": {"a": "part.safetensors"}}', "lists 'part.safetensors'"),
    ],
)
def test_an_index_of_parts_names_files_beside_it(tmp_path, index, reason):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with bounded(tmp_path), pytest.raises(UserError, match=reason):
        weights_files(tmp_path / "folder", "key")


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(shape: list, end: int, start: int = 0, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "nothing": b"",
    "a length beyond the file": safetensors({}, length=2**40),
    "the longest length": safetensors({}, length=2**64 - 1),
    "deep": safetensors(b"[" * 100_000),
    "overlapping": safetensors({"weight": entry([3, 2], 24), "bias": entry([3], 12)}, bytes(24)),
    "an unknown dtype": safetensors({"weight": entry([3, 2], 24, dtype="X9"), "bias": entry([3], 36, 24)}, bytes(36)),
    "petabytes": safetensors({"weight": entry([2**50], 24)}, bytes(24)),
    "more than all": safetensors({"weight": entry([2**62, 2**62], 24)}, bytes(24)),
    "twice": safetensors(b'{"a":' + json.dumps(entry([1], 4)).encode() + b',"a":' + json.dumps(entry([], 4)).encode()
                         + b"}", bytes(4)),
    "metadata of numbers": safetensors({"__metadata__": {"a": 3}}),
    "an empty tensor of any size": safetensors({"weight": entry([0, 2**40], 0), "bias": entry([3], 12)}, bytes(12)),
}  # fmt: skip


@pytest.mark.parametrize(
    "read", [lambda path: with_weights(linear, path, "key"), lambda path: read_loras(path, NETWORKS)]
)
@pytest.mark.parametrize("what", HEADERS)
def test_a_header_that_lies_is_an_error(tmp_path, what, read):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(HEADERS[what])
    with bounded(tmp_path), pytest.raises(UserError, match=r"weights\.safetensors"):
        read(path)


def test_a_header_of_which_millions_of_tensors_could_be_made_is_refused_unread(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(safetensors(b"", length=90_000_000))
    os.truncate(path, 90_000_008)
    with bounded(tmp_path, gibibytes=0.1), pytest.raises(UserError, match=r"header says that it has 90000000 bytes"):
        read_header(path)


# ---------------------------------------------------------------- fuzz


class Small(nn.Module):
    """Two layers under names of a U-Net."""

    def __init__(self):
        super().__init__()
        self.to_q, self.proj_in = nn.Linear(4, 4), nn.Conv2d(4, 4, 1)


NETWORKS = {"unet": Small()}
VALUES = st.one_of(
    st.none(), st.integers(), st.floats(), st.text(max_size=20), st.lists(st.integers(), max_size=3),
    st.sampled_from(["nan", "1e400", "[", "{}", '{"a": 1}', "[" * 2000, "9" * 5000, 2**64, -1, 1e308]),
)  # fmt: skip


def mutated(content: bytes, data: st.DataObject) -> bytes:
    """A small safetensors file with another header, other bytes, or both."""
    size = int.from_bytes(content[:8], "little")
    header, rest = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    kind = data.draw(st.sampled_from(["metadata", "entry", "rename", "bytes", "raw", "cut"]))
    names = [name for name in header if name != "__metadata__"]
    name = data.draw(st.sampled_from(names))
    match kind:
        case "metadata":
            about = header.setdefault("__metadata__", {})
            key = data.draw(st.sampled_from([*about, "alpha", "tokens", "config", "lora_adapter_metadata", "other"]))
            about[key] = str(data.draw(VALUES))
        case "entry":
            key = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            header[name][key] = data.draw(VALUES | st.sampled_from(["F16", "I64", "BOOL", "F8_E4M3", [1], [0, 0]]))
        case "rename":
            parts = name.split(".")
            parts[data.draw(st.integers(0, len(parts) - 1))] = data.draw(st.text(max_size=8) | st.sampled_from(parts))
            header[".".join(parts)] = header.pop(name)
        case "bytes":
            place = data.draw(st.integers(0, len(rest) - 4))
            rest[place : place + 4] = data.draw(st.sampled_from([b"\0\0\xc0\x7f", b"\xff" * 4, b"\0\0\x80\x7f"]))
        case "raw":
            whole = bytearray(content)
            whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
            return bytes(whole)
        case "cut":
            return content[: data.draw(st.integers(0, len(content)))]
    return safetensors(header, bytes(rest))


def damaged(data: st.DataObject, content: object) -> str:
    """A JSON object in which some value is another one or missing, perhaps cut off."""
    content = json.loads(json.dumps(content))
    key = data.draw(st.sampled_from(sorted(content)))
    content[key] = data.draw(VALUES | st.dictionaries(st.text(max_size=3) | st.just("to_q"), VALUES, max_size=2))
    if data.draw(st.booleans()):
        del content[key]
    text = json.dumps(content)
    return text[: data.draw(st.just(len(text)) | st.integers(0, len(text)))]


def fuzzed(path: Path, content: bytes, data: st.DataObject, *readers: Callable[[Path], object]) -> None:
    path.write_bytes(mutated(content, data))
    for read in readers:
        with bounded(path.parent), suppress(UserError):
            read(path)


@fuzz(150)
@given(data=st.data())
def test_any_weights_file_is_read_or_refused(tmp_path, data):
    save_file(linear().state_dict(), tmp_path / "whole.safetensors", {"config": '{"a": 1}', "update": "3"})
    content = (tmp_path / "whole.safetensors").read_bytes()
    fuzzed(
        tmp_path / "a.safetensors", content, data,
        lambda path: with_weights(linear, path, "key"), read_header, lambda path: read_tensors(path, "key"),
    )  # fmt: skip


@fuzz(150)
@given(data=st.data(), kind=st.sampled_from(["warpcore", "diffusers", "kohya"]))
def test_any_lora_file_is_read_or_refused(tmp_path, data, kind):
    lora = Lora({
        "to_q": Adapter(torch.ones(2, 4), torch.ones(4, 2), 2.0),
        "proj_in": Adapter(torch.ones(2, 4, 1, 1), torch.ones(4, 2), 1.0),
    })  # fmt: skip
    write_loras({"unet": lora}, tmp_path / "whole.safetensors", kind, NETWORKS)
    content = (tmp_path / "whole.safetensors").read_bytes()
    fuzzed(tmp_path / "a.safetensors", content, data, lambda path: read_loras(path, NETWORKS))


@fuzz(100)
@given(data=st.data())
def test_any_config_of_peft_is_read_or_refused(tmp_path, data):
    adapters = {"to_q": Adapter(torch.ones(2, 4), torch.ones(4, 2), 2.0)}
    tensors, config = peft.to_peft(adapters, "base_model.model.")
    save_file(tensors, tmp_path / peft.TENSORS)
    (tmp_path / peft.CONFIG).write_text(damaged(data, config), encoding="utf-8")
    with bounded(tmp_path), suppress(UserError):
        read_loras(tmp_path, NETWORKS)


def test_an_alpha_that_is_no_number_is_named(tmp_path):
    tensors, config = peft.to_peft({"to_q": Adapter(torch.ones(2, 4), torch.ones(4, 2), 2.0)}, "base_model.model.")
    save_file(tensors, tmp_path / peft.TENSORS)
    for changed, reason in (
        ({"lora_alpha": "8"}, "adapter_config.json says that to_q has the alpha '8', which is no number"),
        ({"alpha_pattern": {"to_q": None}}, "to_q has the alpha None"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]; it has to name layers"),
        ({"rank_pattern": "to_q"}, "rank_pattern is 'to_q'; it has to name layers"),
    ):
        (tmp_path / peft.CONFIG).write_text(json.dumps(config | changed), encoding="utf-8")
        with pytest.raises(UserError, match=reason):
            read_loras(tmp_path, NETWORKS)
