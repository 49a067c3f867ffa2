"""Files of DiT and PixArt-alpha that anyone may have written: read, or refused by one clear error."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from families.common.lora_files import read_loras, write_loras
from families.common.lora_formats.adapters import Adapter, Lora
from families.dit import build, pixart_build, pixart_files
from families.dit.config import DitSettings
from families.dit.files import dit_numbers
from families.dit.pixart_config import PixartSettings
from families.dit.pixart_names import published_tensors
from families.dit.pixart_transformer import PixArtTransformer2DModel
from families.registry import family_of
from tests.bounds import bounded, fuzz
from tests.families.common.test_hostile_weights import damaged, mutated
from tests.families.dit.classed import CLASSES, SMALL, random_network
from tests.families.dit.pixart import SMALL as SMALL_PIXART
from warpcore.errors import UserError

KEY = "generator_checkpoint_path"
NAMES = st.sampled_from(
    ["x_embedder.proj.weight", "blocks.0.attn.qkv.weight", "final_layer.linear.weight", "blocks.1.mlp.fc1.bias",
     "y_embedder.embedding_table.weight", "y_embedder.y_embedding", "pos_embed", "y_embedder.y_proj.fc1.weight",
     "final_layer.scale_shift_table", "blocks.999999999.mlp.fc1.weight", f"blocks.{'9' * 5000}.mlp.fc1.weight",
     "csize_embedder.mlp.0.weight", "blocks.0.scale_shift_table"]
)  # fmt: skip
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 16, 24, 32, 1152]), max_size=5)


def pixart() -> nn.Module:
    torch.manual_seed(0)
    return PixArtTransformer2DModel(8, **SMALL_PIXART)


def read_dit(path: Path) -> None:
    family_of(path)
    dit_numbers(path, KEY)
    build.dit(DitSettings(model_version="mini", num_classes=CLASSES, generator_checkpoint_path=path), (32, 32))


def read_pixart(path: Path) -> None:
    with suppress(UserError):
        family_of(path)
    pixart_files.find_denoiser(path, KEY).tensors()
    pixart_build.denoiser(PixartSettings(model_version="mini", generator_checkpoint_path=path))


READERS = {"dit": (read_dit, random_network), "pixart": (read_pixart, pixart)}


def published(network: nn.Module) -> dict[str, Tensor]:
    state = network.state_dict()
    return state if "x_embedder.proj.weight" in state else published_tensors(state)


@pytest.fixture
def small_pixart(monkeypatch):
    monkeypatch.setitem(pixart_files.HEADS, SMALL_PIXART["cross_attention_dim"], SMALL_PIXART["num_attention_heads"])


@fuzz(60)
@given(data=st.data(), name=NAMES, shape=SHAPES, kind=st.sampled_from(list(READERS)))
def test_any_published_file_is_read_or_refused(tmp_path, small_mini, small_pixart, data, name, shape, kind):
    read, network = READERS[kind]
    state = published(network())
    if data.draw(st.booleans()):
        state.pop(name, None)
    else:
        state[name] = torch.ones(shape, dtype=data.draw(st.sampled_from([torch.float32, torch.int64, torch.bool])))
    path = tmp_path / f"a.{data.draw(st.sampled_from(['pt', 'pth']))}"
    torch.save({"state_dict": state} if data.draw(st.booleans()) else state, path)
    with bounded(tmp_path), suppress(UserError):
        read(path)


@fuzz(60)
@given(data=st.data(), kind=st.sampled_from(list(READERS)))
def test_any_file_of_a_run_is_read_or_refused(tmp_path, small_mini, small_pixart, data, kind):
    read, network = READERS[kind]
    config = damaged(data, SMALL | {"input_size": 2} if kind == "dit" else SMALL_PIXART)
    about = {"config": config, "family": kind, "diffusion_target": "epsilon"}
    save_file(network().state_dict(), tmp_path / "whole.safetensors", about)
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(mutated(content, data) if data.draw(st.booleans()) else content)
    with bounded(tmp_path), suppress(UserError):
        read(tmp_path / "a.safetensors")


@fuzz(40)
@given(data=st.data())
def test_any_config_of_a_folder_of_pixart_is_built_or_refused(tmp_path, data):
    folder = tmp_path / "transformer"
    folder.mkdir(exist_ok=True)
    if not (folder / "model.safetensors").exists():
        save_file(pixart().state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(damaged(data, SMALL_PIXART), encoding="utf-8")
    with bounded(tmp_path), suppress(UserError):
        read_pixart(folder)


@pytest.mark.parametrize(
    "changed", [{"depth": 10**9}, {"depth": -1}, {"depth": "many"}, {"depth": [1]}, {"hidden_size": {}}]
)
def test_numbers_of_a_file_of_dit_are_checked(tmp_path, small_mini, changed):
    path = tmp_path / "a.safetensors"
    save_file(random_network().state_dict(), path, {"config": json.dumps(SMALL | {"num_classes": CLASSES} | changed)})
    with bounded(tmp_path), suppress(UserError):
        read_dit(path)


@pytest.mark.parametrize(
    "changed",
    [{"num_layers": 10**9}, {"sample_size": 10**9}, {"num_attention_heads": 10**9}, {"patch_size": 0},
     {"caption_channels": "x"}, {"interpolation_scale": 0}, {"norm_type": "x"}, {"sample_size": [1]}, {"x" * 9: 1}],
)  # fmt: skip
def test_numbers_of_a_folder_of_pixart_are_checked(tmp_path, changed):
    save_file(pixart().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SMALL_PIXART | changed), encoding="utf-8")
    with bounded(tmp_path), suppress(UserError):
        read_pixart(tmp_path)


@fuzz(40)
@given(data=st.data())
def test_any_lora_file_of_pixart_is_read_or_refused(tmp_path, data):
    networks, place = {"transformer": pixart()}, "transformer_blocks.0.attn1.to_q"
    rows, columns = networks["transformer"].get_submodule(place).weight.shape
    lora = Lora({place: Adapter(torch.ones(2, columns), torch.ones(rows, 2), 2.0)})
    write_loras({"transformer": lora}, tmp_path / "whole.safetensors", "diffusers", networks)
    (tmp_path / "a.safetensors").write_bytes(mutated((tmp_path / "whole.safetensors").read_bytes(), data))
    with bounded(tmp_path), suppress(UserError):
        read_loras(tmp_path / "a.safetensors", networks)
