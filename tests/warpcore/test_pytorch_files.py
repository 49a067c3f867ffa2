"""Files of PyTorch are written tensor by tensor, and read like those of `torch.save`."""

import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from warpcore.meta import PeakMemory
from warpcore.pytorch_files import write_pytorch_file


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_was_written(tmp_path, mmap):
    whole = torch.randn(6, 4)
    tensors = {
        "view": whole[2:], "turned": whole.T, "scalar": torch.tensor(2.5), "none": torch.zeros(0, 3),
        "half": torch.randn(3).bfloat16(), "counts": torch.arange(5), "flags": torch.tensor([True, False]),
    }  # fmt: skip
    write_pytorch_file(tmp_path / "a.pt", tensors)
    found = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mmap)
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert zipfile.ZipFile(tmp_path / "a.pt").testzip() is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_memory_holds_one_converted_tensor(tmp_path):
    save_file({f"layer{i}": torch.randn(64, 64) for i in range(8)}, tmp_path / "a.safetensors")
    mapped = load_file(tmp_path / "a.safetensors")
    with PeakMemory(mapped.values(), device="cpu") as memory:
        write_pytorch_file(tmp_path / "a.pt", mapped, torch.bfloat16, unchanged=["layer0"])
    assert memory.peak <= 2 * 64 * 64 * 2  # one, and the one before it
    found = torch.load(tmp_path / "a.pt", weights_only=True)
    for name, tensor in mapped.items():
        assert torch.equal(found[name], tensor if name == "layer0" else tensor.bfloat16())
