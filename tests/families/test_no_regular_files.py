"""A pipe, a device or a folder in the place of a family's file is refused by name at once."""

import os
import signal

import pytest

from families.common import library_files, weight_files, weights
from families.common.lora_formats.tensors import read_tensors
from families.common.pictures import read_picture, size_of
from families.stable_diffusion import components, single_file
from tools.convert_weights import convert
from warpcore.errors import UserError


@pytest.fixture(autouse=True)
def impatient():
    """What waits for a pipe fails at once."""
    signal.alarm(30)
    yield
    signal.alarm(0)


READERS = {
    "weights": lambda path: weights.read_weights(path, "key"),
    "header": weight_files.read_header,
    "library": lambda path: library_files._open(path, "key"),
    "LoRA": read_tensors,
    "single file": lambda path: single_file._open(path, "key"),
    "scheduler": lambda path: components._json(path, "key"),
    "conversion": lambda path: convert(path, path.with_name("new"), None),
    "picture": read_picture,
    "size of a picture": size_of,
}


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder"])
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_file_is_refused(tmp_path, name, ending, kind):
    path = tmp_path / f"x{ending}"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=rf"x\{ending}.* is {kind}"):
        READERS[name](path)
