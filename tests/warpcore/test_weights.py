"""Files of weights."""

import os

import pytest
import torch
from safetensors.torch import load_file

from warpcore.weights import write_weights


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_says_who_may_read_a_file_of_weights(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_weights(tmp_path / "a.safetensors", {"x": torch.eye(3).T[1:]})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.eye(3)[1:])
