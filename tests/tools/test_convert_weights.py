import pytest
import torch
from safetensors.torch import load_file

from tools.convert_weights import convert
from warpcore.errors import UserError
from warpcore.weights import write_weights


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 10, b"<html>"])
def test_a_file_of_another_kind_is_named(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors is no whole safetensors file"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", torch.bfloat16)
    assert not (tmp_path / "y.safetensors").exists()


def test_a_file_that_is_there_is_replaced_only_when_asked(tmp_path):
    file = tmp_path / "x.safetensors"
    write_weights(file, {"a": torch.ones(2)})
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"x\.safetensors is there already: name another file, or give --overwrite"):
        convert(file, file, torch.bfloat16)
    assert file.read_bytes() == before
    convert(file, file, torch.bfloat16, overwrite=True)
    assert load_file(file)["a"].dtype == torch.bfloat16
