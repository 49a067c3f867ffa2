"""Files and folders of Cosmos-Predict2 that anyone may have written: read, or refused by one clear error."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from families.common.lora_files import read_loras, write_loras
from families.common.lora_formats.adapters import Adapter, Lora
from families.cosmos import build
from families.cosmos.config import CosmosSettings
from tests.bounds import bounded, fuzz
from tests.families.common.test_hostile_weights import damaged, mutated
from tests.families.cosmos.tiny_pipeline import TRANSFORMER, transformer, write_published
from warpcore.errors import UserError

KEY = "generator_checkpoint_path"


def built(path: Path) -> None:
    settings = CosmosSettings(model_version="mini", generator_checkpoint_path=path)
    assert build.LIBRARY_DEFAULTS.keys() <= build.transformer_numbers(settings).keys()
    build.transformer(settings)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("x_embedder.proj.1.weight", ()),
        ("x_embedder.proj.1.weight", (24, 68, 1)),
        ("x_embedder.proj.1.weight", (0, 68)),
        ("blocks.0.self_attn.q_norm.weight", (0,)),
        ("blocks.0.cross_attn.k_proj.weight", (16,)),
        ("blocks.0.mlp.layer1.weight", ()),
        ("blocks.999999999.mlp.layer1.weight", (2, 2)),
        (f"blocks.{'9' * 5000}.mlp.layer1.weight", (2, 2)),
    ],
)
def test_a_published_file_with_other_shapes_is_refused(tmp_path, name, shape):
    file = write_published(tmp_path / "model.pt", transformer())
    torch.save(torch.load(file, weights_only=True) | {f"net.{name}": torch.ones(shape)}, file)
    with bounded(tmp_path), pytest.raises(UserError, match=rf"^{KEY}: .*"):
        built(file)


@fuzz(60)
@given(data=st.data())
def test_any_config_of_a_denoiser_is_built_or_refused(tmp_path, data):
    folder = tmp_path / "transformer"
    folder.mkdir(exist_ok=True)
    if not (folder / "model.safetensors").exists():
        save_file(transformer().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(damaged(data, TRANSFORMER), encoding="utf-8")
    with bounded(tmp_path), suppress(UserError):
        built(folder)


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return {"transformer": build.transformer(CosmosSettings(model_version="mini"))}


@fuzz(60)
@given(data=st.data(), kind=st.sampled_from(["comfyui", "published"]))
def test_any_lora_file_is_read_or_refused(tmp_path, networks, data, kind):
    place = "transformer_blocks.0.attn1.to_q"
    rows, columns = networks["transformer"].get_submodule(place).weight.shape
    lora = Lora({place: Adapter(torch.ones(2, columns), torch.ones(rows, 2), 2.0)})
    write_loras({"transformer": lora}, tmp_path / "whole.safetensors", kind, networks)
    (tmp_path / "a.safetensors").write_bytes(mutated((tmp_path / "whole.safetensors").read_bytes(), data))
    with bounded(tmp_path), suppress(UserError):
        read_loras(tmp_path / "a.safetensors", networks)


def test_numbers_of_a_config_are_checked(tmp_path):
    save_file(transformer().state_dict(), tmp_path / "model.safetensors")
    for changed, reason in (
        ({"num_layers": 10**9}, "num_layers is 1000000000"),
        ({"patch_size": 3}, "patch_size of .* is 3, which is no three numbers"),
        ({"patch_size": [1, 2, "2"]}, "which is no three numbers"),
        ({"num_attention_heads": {"a": [1]}}, "its config is none of Cosmos"),
        ({"max_size": None}, "max_size of .* is None, which is no three numbers"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(TRANSFORMER | changed), encoding="utf-8")
        with bounded(tmp_path), pytest.raises(UserError, match=reason):
            built(tmp_path)
