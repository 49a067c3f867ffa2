import pytest
import torch

from tools.convert_weights import convert
from warpcore.errors import UserError


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 10, b"<html>"])
def test_a_file_of_another_kind_is_named(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors is no whole safetensors file"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", torch.bfloat16)
    assert not (tmp_path / "y.safetensors").exists()
