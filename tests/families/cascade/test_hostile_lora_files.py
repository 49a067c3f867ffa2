"""LoRA files of Stable Cascade that anyone may have written, in every format: read, or refused by one clear error."""

import json
from contextlib import suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from families.cascade.lora_files import FORMATS, read_lora, write_lora
from families.common.lora_formats import peft
from families.common.lora_formats.adapters import Adapter, Lora, LoraFileError
from modules.lora import places
from tests.bounds import bounded, fuzz
from tests.families.common.test_hostile_weights import mutated
from tests.modules.test_stage_c import golden_model
from warpcore.errors import UserError


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return golden_model("stage_c_small")[0].to("meta")


@pytest.fixture(scope="module")
def place(network) -> str:
    """A layer of attention."""
    return next(place for place in places(network) if place.endswith(".attn"))


@pytest.fixture(scope="module")
def adapter(network, place) -> Adapter:
    rows, columns = places(network)[place].weight.shape
    return Adapter(torch.ones(2, columns), torch.ones(rows, 2), 2.0)


@fuzz(100)
@given(data=st.data(), kind=st.sampled_from(FORMATS))
def test_any_lora_file_is_read_or_refused(tmp_path, network, place, adapter, data, kind):
    whole = tmp_path / ("folder" if kind == "peft" else "whole.safetensors")
    write_lora(Lora({place: adapter}), whole, kind, network)
    content = (whole / peft.TENSORS if kind == "peft" else whole).read_bytes()
    (tmp_path / "a.safetensors").write_bytes(mutated(content, data))
    with bounded(tmp_path), suppress(UserError):
        read_lora(tmp_path / "a.safetensors", network, [place])


@pytest.mark.parametrize(("about", "changed", "reason"), [
    ({"layers": "{}"}, {}, "its metadata say layers: {}, which is not a JSON list of texts"),
    ({"layers": "[" * 100_000}, {}, "its metadata say layers: "),
    ({"layers": "[3]"}, {}, "which is not a JSON list of texts"),
    ({"alpha": "[]"}, {}, "its metadata say alpha"),
    ({}, {"weights.0.lora_up": torch.ones(3)}, "has tensors of 2 and 1 dimensions: no matrices"),
    ({}, {"weights.0.lora_down": torch.tensor(1.0)}, "has tensors of 0 and 2 dimensions: no matrices"),
    ({}, {"embeddings.indices": torch.ones(1, 1)}, "it names 1 tokens without their embeddings"),
])  # fmt: skip
def test_what_a_numbered_file_says_is_checked(tmp_path, network, place, adapter, about, changed, reason):
    tensors = {"weights.0.lora_down": adapter.down, "weights.0.lora_up": adapter.up}
    layers = {"layers": json.dumps([place])}
    save_file(tensors | changed, tmp_path / "a.safetensors", layers | about)
    with bounded(tmp_path), pytest.raises(LoraFileError, match=reason):
        read_lora(tmp_path / "a.safetensors", network)
    save_file(tensors, tmp_path / "a.safetensors", layers | {"alpha": json.dumps({place: 2})})
    assert read_lora(tmp_path / "a.safetensors", network).adapters[place].alpha == 2
