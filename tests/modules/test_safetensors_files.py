"""Files of weights that are none, or not whole: what an error says of them."""

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from modules.safetensors_files import load_weights, open_weights


@pytest.mark.parametrize("read", [open_weights, load_weights])
@pytest.mark.parametrize(
    ("keep", "told"),
    [
        (lambda whole: whole[:-1], "it is cut off or damaged: download or copy it again"),
        (lambda whole: whole[:5], "it is cut off or damaged: download or copy it again"),
        (lambda _: b"", "it is cut off or damaged: download or copy it again"),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "it is a pointer of Git LFS, not the"),
        (lambda _: b"<!DOCTYPE html><html>", "it is a web page, not the file itself"),
    ],
)
def test_what_is_no_whole_file_says_what_to_do(read, keep, told, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(3)}, path)
    path.write_bytes(keep(path.read_bytes()))
    with pytest.raises(SafetensorError, match=told):
        read(path)
