"""What a config needs of networks is checked at the start: an error names the network, what it lacks and the key."""

import pytest
import torch
from torch import nn

from modules.blocks import MultiheadAttention
from modules.dit import DiT
from modules.lora import LoraSettings, add_adapters
from modules.stage_a import StageA
from modules.stage_c import StageC
from tests.golden import load_case
from tests.warpcore.runs import tiny_settings, write_shard
from tests.warpcore.tiny import Denoiser, TinyConfig
from warpcore.config import make_config
from warpcore.errors import UserError
from warpcore.networks import blocks, check_networks, convolution_weights, forward_methods, is_whole, linear_weights

WANTS = {
    "activation_checkpointing": ({"activation_checkpointing": 2}, "set_activation_checkpointing"),
    "compile": ({"compile": True}, r"compile_blocks\(\)"),
    "fp8": ({"fp8": True, "dtype": "bfloat16"}, "blocks with linear layers"),
    "offload": ({"offload": ["activations"], "activation_checkpointing": 1}, "lacks blocks"),
}


class Checkpointed(nn.Linear):
    def set_activation_checkpointing(self, level: int) -> None:
        self.level = level


class Whole(Checkpointed):
    """A network that offers everything."""

    forward_methods = ("encode",)

    def __init__(self):
        super().__init__(16, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def compile_blocks(self, graphs: bool = False) -> None:
        pass


def config_with(tmp_path, changes: dict) -> TinyConfig:
    return make_config(TinyConfig, tiny_settings(tmp_path, tmp_path / "a.tar") | changes)


@pytest.mark.parametrize("key", WANTS)
def test_a_network_that_lacks_what_a_key_needs_is_refused(key, tmp_path):
    changes, lacking = WANTS[key]
    network = Checkpointed(16, 16) if key == "offload" else nn.Linear(16, 16)
    config = config_with(tmp_path, changes)
    with pytest.raises(UserError, match=rf"^{key}.*network generator \({type(network).__name__}\).*{lacking}"):
        check_networks({"generator": network}, ["generator"], config)
    check_networks({"generator": Whole()}, ["generator"], config)


def test_a_plain_network_is_enough_where_nothing_needs_more(tmp_path):
    check_networks({"generator": nn.Linear(2, 2)}, ["generator"], config_with(tmp_path, {}))
    assert blocks(nn.Linear(2, 2)) == forward_methods(nn.Linear(2, 2)) == ()


def test_one_network_that_compiles_is_enough_and_every_trained_one_is_checkpointed(tmp_path):
    networks = {"generator": nn.Linear(2, 2), "frozen": Whole()}
    check_networks(networks, ["generator"], config_with(tmp_path, {"compile": True}))
    with pytest.raises(UserError, match=r"compile: graphs: the network generator .* lacks compile_blocks\(\)"):
        check_networks(networks, ["generator"], config_with(tmp_path, {"compile": "graphs"}))
    check_networks(networks, ["frozen"], config_with(tmp_path, {"compile": "graphs"}))
    with pytest.raises(UserError, match="network generator"):
        check_networks(networks, ["frozen", "generator"], config_with(tmp_path, {"activation_checkpointing": 1}))


def test_the_networks_of_the_cascade_offer_it():
    stage_c = StageC(**load_case("stage_c_small")[0]["constructor"])
    assert is_whole(stage_c)
    assert is_whole(Whole())
    assert blocks(DiT(4, 2, hidden_size=16, depth=2, num_heads=2))  # a submodule, not a property
    assert not is_whole(nn.Linear(2, 2))
    assert forward_methods(StageA(bottleneck_blocks=1, c_hidden=16, codebook_size=32)) == ("encode", "decode")


@pytest.mark.integration
def test_a_run_ends_with_that_error_before_its_first_update(tmp_path):
    shard = write_shard(tmp_path / "a.tar", 4)
    run = Denoiser(make_config(TinyConfig, tiny_settings(tmp_path, shard) | {"activation_checkpointing": 1}))
    with pytest.raises(UserError, match=r"activation_checkpointing: the network generator \(Sequential\) lacks"):
        run.run()


def test_the_weights_of_linear_layers_are_told_from_tables_and_embeddings():
    network = nn.ModuleDict({
        "attention": MultiheadAttention(8, 2), "classes": nn.Embedding(3, 8), "time_embed": nn.Linear(8, 8),
        "block": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv2d(8, 8, 1)),
    })  # fmt: skip
    network["block"].register_parameter("scale_shift_table", nn.Parameter(torch.zeros(6, 8)))
    add_adapters(network, ["block.0", "attention"], LoraSettings(rank=2, alpha=2))
    assert linear_weights({"net": network}) == {
        "net.attention.in_proj_weight", "net.attention.out_proj.weight", "net.block.0.weight",
        *(f"net.{layer}.lora.{part}" for layer in ("attention", "block.0") for part in ("up", "down")),
        *(f"net.attention.out_proj.lora.{part}" for part in ("up", "down")),
    }  # fmt: skip
    assert convolution_weights({"net": network}) == {"net.block.2.weight"}
