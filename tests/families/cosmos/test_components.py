"""Where the networks of Cosmos-Predict2 are found, and what is refused by one clear error."""

import logging
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from families.common.wan_autoencoder import WanAutoencoder
from families.cosmos import build
from families.cosmos.components import find_transformer
from families.cosmos.config import CosmosSettings
from families.cosmos.versions import MINI, VERSIONS
from families.registry import family_of
from tests.families.cosmos.tiny_pipeline import TRANSFORMER, transformer, write_cosmos, write_published
from warpcore.errors import UserError

KEY = "generator_checkpoint_path"
NUMBERS = ("num_attention_heads", "attention_head_dim", "num_layers", "text_embed_dim", "adaln_lora_dim", "mlp_ratio")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_cosmos(tmp_path_factory.mktemp("pipeline"))


def average(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Further tensors of a published file: another network's, as its average."""
    from families.cosmos.original_names import published_tensors

    other = transformer(seed=5)
    tensors = published_tensors(other.state_dict(), network.config.attention_head_dim)
    return {f"net_ema.{name}": tensor for name, tensor in tensors.items()}


def first_weight(**settings) -> torch.Tensor:
    network = build.transformer(CosmosSettings(model_version="mini", **settings))
    return network.state_dict()["transformer_blocks.0.attn1.to_q.weight"]


def test_published_files_folders_and_runs_are_read(tmp_path, pipeline):
    network = transformer()
    expected = network.state_dict()["transformer_blocks.0.attn1.to_q.weight"]
    alone = write_published(tmp_path / "plain" / "model.pt", network)
    write_published(tmp_path / "run" / "checkpoints" / "model" / "iter_000000500.pt", network)
    (tmp_path / "run" / "checkpoints" / "latest_checkpoint.txt").write_text("iter_000000500.pt\n")
    (tmp_path / "run" / "config.yaml").write_text("job:\n  name: of the published program\n")
    bare = write_published(tmp_path / "bare.pth", network, prefix="")
    places = [alone, alone.parent, tmp_path / "run", tmp_path / "run" / "checkpoints", bare]
    for place in places:
        found = find_transformer(place, KEY).config
        assert {key: found[key] for key in NUMBERS} == {key: network.config[key] for key in NUMBERS}
        assert torch.equal(first_weight(generator_checkpoint_path=place), expected.bfloat16().float())
        assert family_of(place).name == "cosmos"
    for place in (pipeline, pipeline / "transformer"):
        assert torch.equal(first_weight(generator_checkpoint_path=place), expected)
        assert family_of(place).name == "cosmos"


@pytest.mark.parametrize("patch", [1, 2])
def test_a_published_file_tells_its_patches(tmp_path, patch):
    network = diffusers.CosmosTransformer3DModel(**TRANSFORMER | {"patch_size": (1, patch, patch)})
    file = write_published(tmp_path / "model.pt", network)
    found = find_transformer(file, KEY).config
    assert (found["patch_size"], found["in_channels"]) == ([1, patch, patch], 16)
    built = build.transformer(CosmosSettings(model_version="mini", generator_checkpoint_path=file))
    assert built.patch_embed.proj.weight.shape == network.patch_embed.proj.weight.shape


def test_random_weights_are_drawn_as_the_published_program_does():
    torch.manual_seed(0)
    network = build.transformer(CosmosSettings(model_version="mini"))
    assert not network.transformer_blocks[0].norm1.linear_2.weight.any()
    for layer in (network.transformer_blocks[1].ff.net[2], network.norm_out.linear_2, network.patch_embed.proj):
        scaled = layer.weight * layer.in_features**0.5
        assert scaled.abs().max() <= 3
        assert scaled.std().item() == pytest.approx(0.987, abs=0.05)  # of a normal number that is cut at 3


def test_the_average_of_a_published_file_is_read_where_it_is_asked_for(tmp_path):
    network = transformer()
    both = write_published(tmp_path / "both.pt", network, **average(network))
    name = "transformer_blocks.0.attn1.to_q.weight"
    plain, averaged = (find_transformer(both, KEY, asked).tensors()[name] for asked in (False, True))
    assert torch.equal(plain.float(), network.state_dict()[name].bfloat16().float())
    assert torch.equal(averaged, transformer(seed=5).state_dict()[name])
    only = write_published(tmp_path / "plain.pt", network)
    assert torch.equal(find_transformer(only, KEY, average=True).tensors()[name], plain)


def test_the_published_autoencoder_beside_a_published_file_is_found(tmp_path):
    from tests.golden import load_case, weights_of

    file = write_published(tmp_path / "model.pt", transformer())
    spec, tensors = load_case("cosmos/vae_small")
    (tmp_path / "tokenizer").mkdir()
    torch.save(weights_of(spec, tensors), tmp_path / "tokenizer" / "tokenizer.pth")
    settings = CosmosSettings(generator_checkpoint_path=file)
    found = build.autoencoder_source(settings)
    assert found.path == tmp_path / "tokenizer" / "tokenizer.pth"
    ours = WanAutoencoder.of(spec["same_in_diffusers"]["constructor"], found.tensors, found.path)
    latents = ours.scale.latents(ours._encode(tensors["in.picture"][:, :, 0]), None)
    torch.testing.assert_close(latents, tensors["out.picture.latents"][:, :, 0], rtol=0, atol=2e-5)


def test_a_lora_in_a_published_file_is_not_passed_over_in_silence(tmp_path, caplog):
    network = transformer()
    file = write_published(tmp_path / "lora.pt", network)
    tensors = torch.load(file, weights_only=True)
    layer = "net.blocks.0.self_attn.q_proj"
    tensors[f"{layer}.base_layer.weight"] = tensors.pop(f"{layer}.weight")
    tensors |= {
        f"{layer}.lora_A.default.weight": torch.ones(2, 24),
        f"{layer}.lora_B.default.weight": torch.ones(24, 2),
    }
    torch.save(tensors, file)
    with caplog.at_level(logging.WARNING):
        found = first_weight(generator_checkpoint_path=file)
    assert torch.equal(found, network.state_dict()["transformer_blocks.0.attn1.to_q.weight"].bfloat16().float())
    assert "holds a LoRA beside the weights" in caplog.text


def broken(folder: Path, kind: str) -> Path:
    network, file = transformer(), folder / f"{kind.replace(' ', '_')}.pt"
    if kind == "cut":
        whole = write_published(file, network).read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
    elif kind == "another network":
        torch.save({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2)}, file)
    elif kind == "a missing layer":
        write_published(file, network)
        tensors = torch.load(file, weights_only=True)
        del tensors["net.blocks.1.mlp.layer1.weight"]
        torch.save(tensors, file)
    elif kind == "a video model":
        tensors = torch.load(write_published(file, network), weights_only=True)
        tensors["net.x_embedder.proj.1.weight"] = torch.zeros(24, 72)
        torch.save(tensors, file)
    elif kind == "a run without its checkpoint":
        file = folder / "run"
        file.mkdir()
        (file / "latest_checkpoint.txt").write_text("iter_000000500.pt\n")
    elif kind == "an empty folder":
        file = folder / "empty"
        file.mkdir()
    elif kind == "another size":
        file = write_published(file, network)
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "cannot be read as weights"),
        ("another network", "holds no denoiser of Cosmos-Predict2"),
        ("a missing layer", "ff.net.0.proj.weight is missing in the file"),
        ("a video model", "Video2World"),
        ("a run without its checkpoint", "iter_000000500.pt, but there is no"),
        ("an empty folder", "no folder with a Cosmos-Predict2"),
        ("another size", "of no published size .heads x head size x blocks: 2x12x2; 2B has 16x128x28"),
    ],
)
def test_what_is_no_such_network_is_refused_by_name(tmp_path, kind, message):
    file = broken(tmp_path, kind)
    version = "2B" if kind == "another size" else "mini"
    with pytest.raises(UserError, match=message) as error:
        build.transformer(CosmosSettings(model_version=version, generator_checkpoint_path=file))
    assert str(file) in str(error.value)
    assert KEY in str(error.value)


def test_code_in_a_published_file_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"net.blocks.0.self_attn.q_proj.weight": Trap()}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="cannot be read as weights"):
        find_transformer(tmp_path / "model.pt", KEY)
    assert not (tmp_path / "sprung").exists()


def test_a_missing_autoencoder_or_text_encoder_is_named(tmp_path):
    file = write_published(tmp_path / "model.pt", transformer())
    settings = CosmosSettings(model_version="mini", generator_checkpoint_path=file)
    settings = settings.model_copy(update={"model_version": "2B"})
    with pytest.raises(UserError, match="autoencoder_checkpoint_path is missing, and none stands beside"):
        build.autoencoder(settings)
    with pytest.raises(UserError, match=r"text_encoder_checkpoint_path is missing.*google-t5/t5-11b"):
        build.text_encoder(settings)


def test_a_file_in_diffusers_names_without_a_config_is_read(tmp_path):
    network = transformer()
    save_file(dict(network.state_dict()), tmp_path / "plain.safetensors")
    found = find_transformer(tmp_path / "plain.safetensors", KEY)
    assert found.config["num_layers"] == 2
    assert first_weight(generator_checkpoint_path=tmp_path / "plain.safetensors").shape == (24, 24)


@pytest.mark.parametrize("name", ["autoencoder", "t5", "text_tower"])
def test_a_file_of_another_network_is_called_that(name):
    file = MINI / f"{name}.safetensors"
    with pytest.raises(
        UserError, match=f"{name}.safetensors holds no denoiser of Cosmos-Predict2: .* (but|and it has) "
    ):
        build.transformer(CosmosSettings(model_version="mini", generator_checkpoint_path=file))


def test_what_tensors_of_a_published_file_do_not_tell_is_that_of_their_size(tmp_path):
    network = build.transformer(CosmosSettings(model_version="mini"))
    file = write_published(tmp_path / "model.pt", network)
    found = find_transformer(file, KEY).config
    assert {name: found[name] for name in VERSIONS["mini"].transformer} == dict(VERSIONS["mini"].transformer)
    assert found["rope_scale"] != TRANSFORMER["rope_scale"]
