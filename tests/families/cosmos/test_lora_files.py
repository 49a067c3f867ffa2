"""LoRA on the denoiser: the published program's, and files in the names of every program, both ways."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from families.common.lora import merge_loras
from families.common.lora_files import write_loras
from families.common.lora_formats import Adapter, Lora, LoraFileError
from families.common.transformer_lora import TRANSFORMER, read_lora
from families.cosmos.original_names import library_layer, library_tensors
from families.cosmos.transformer import CosmosTransformer3DModel
from modules.lora import places
from tests.families.cosmos.small import TEXT, constructor
from tests.golden import load_case, load_manifest, weights_of

FORMATS = ("warpcore", "diffusers", "comfyui", "published")


def published_lora() -> tuple[CosmosTransformer3DModel, dict, dict]:
    """The base of the golden case, its tensors, and its file: the whole network with peft's layers in it."""
    spec, tensors = load_case("cosmos/lora")
    base = weights_of(spec, tensors)
    adapters = {name.removeprefix("weights."): t for name, t in tensors.items() if ".lora_" in name}
    network = CosmosTransformer3DModel(**constructor(spec))
    network.load_state_dict(library_tensors(base))
    layers = {name.partition(".lora_")[0] for name in adapters}
    named = {name.replace(".weight", ".base_layer.weight") if name.removesuffix(".weight") in layers else name: tensor
             for name, tensor in base.items()}  # fmt: skip
    return network.eval(), tensors, {f"net.{name}": tensor for name, tensor in (named | adapters).items()}


@torch.no_grad()
def test_a_lora_of_the_published_program_changes_what_it_changes_there(tmp_path):
    network, tensors, file = published_lora()
    torch.save(file, tmp_path / "iter_000000500.pt")
    lora = read_lora(tmp_path / "iter_000000500.pt", network)
    assert len(lora.adapters) == 20
    merge_loras(network, [(lora, 1.0)])
    found = [
        network(tensors["in.x"][row], tensors["in.t"].flatten()[row], tensors["in.text"][row],
                padding_mask=tensors["in.mask"][row]).sample
        for row in (slice(0, 1), slice(1, 2))
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(found), tensors["out.forward"], rtol=0, atol=1e-4)
    assert TEXT == "encoder_hidden_states"


def some_lora(network: torch.nn.Module, alpha: float = 3.0) -> Lora:
    random = torch.Generator().manual_seed(0)

    def adapter(weight: torch.Tensor) -> Adapter:
        down, up = (torch.randn(*shape, generator=random) for shape in ((2, weight.shape[1]), (weight.shape[0], 2)))
        return Adapter(down, up, alpha)

    chosen = (".to_", ".ff.", ".norm1.")
    return Lora({n: adapter(p.weight) for n, p in places(network).items() if any(part in n for part in chosen)})


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_is_read_back_as_the_same_change(tmp_path, kind):
    network, *_ = published_lora()
    lora, file = some_lora(network), tmp_path / "lora.safetensors"
    write_loras({TRANSFORMER: lora}, file, kind, {TRANSFORMER: network})
    again = read_lora(file, network)
    assert again.adapters.keys() == lora.adapters.keys()
    for name, adapter in lora.adapters.items():
        changes = [one.scale * one.up @ one.down for one in (adapter, again.adapters[name])]
        torch.testing.assert_close(changes[1], changes[0], rtol=1e-6, atol=1e-6)


def test_names_in_files_are_those_of_each_program(tmp_path):
    network, *_ = published_lora()
    names = load_manifest("lora_2B_rank16", "cosmos")["names_elsewhere_of_first_block"]
    wanted = {library_layer(name.removeprefix("net.").partition(".lora_")[0]) for name in names}
    lora = Lora({name: a for name, a in some_lora(network).adapters.items() if name in wanted})
    assert lora.adapters.keys() == wanted
    found = {}
    for kind in FORMATS[1:]:
        write_loras({TRANSFORMER: lora}, tmp_path / f"{kind}.safetensors", kind, {TRANSFORMER: network})
        found[kind] = {name for name in load_file(tmp_path / f"{kind}.safetensors") if not name.endswith(".alpha")}
    assert found["published"] == names.keys()
    for program in ("diffusers", "comfyui"):
        assert found[program] == {elsewhere[program] for elsewhere in names.values()}


def test_diffusers_loads_the_file_and_computes_the_same(tmp_path):
    network, tensors, _ = published_lora()
    lora = some_lora(network)
    write_loras({TRANSFORMER: lora}, tmp_path / "lora.safetensors", "diffusers", {TRANSFORMER: network})
    theirs, *_ = published_lora()
    theirs.load_lora_adapter(load_file(tmp_path / "lora.safetensors"), prefix=TRANSFORMER, metadata=None,
                             network_alphas=None)  # fmt: skip
    given = [tensors["in.x"][:1], tensors["in.t"].flatten()[:1], tensors["in.text"][:1]]
    with torch.no_grad():
        plain = Lora({name: Adapter(a.down, a.up, alpha=2.0) for name, a in lora.adapters.items()})
        merge_loras(network, [(plain, 1.0)])  # without its metadata, the library takes the rank for alpha
        torch.testing.assert_close(theirs(*given).sample, network(*given).sample, rtol=0, atol=1e-3)


def test_dora_has_no_published_names(tmp_path):
    network, *_ = published_lora()
    name, adapter = next(iter(some_lora(network).adapters.items()))
    lora = Lora({name: Adapter(adapter.down, adapter.up, 2.0, magnitude=torch.ones(adapter.up.shape[0]))})
    with pytest.raises(LoraFileError, match="DoRA, which has no published names"):
        write_loras({TRANSFORMER: lora}, tmp_path / "a.safetensors", "published", {TRANSFORMER: network})


def test_a_lora_of_another_network_is_refused(tmp_path):
    network, *_ = published_lora()
    layer = "diffusion_model.blocks.7.self_attn.q_proj"
    save_file({f"{layer}.lora_A.weight": torch.ones(2, 64), f"{layer}.lora_B.weight": torch.ones(64, 2)},
              tmp_path / "a.safetensors")  # fmt: skip
    with pytest.raises(LoraFileError, match="of a layer that this network does not have"):
        read_lora(tmp_path / "a.safetensors", network)
