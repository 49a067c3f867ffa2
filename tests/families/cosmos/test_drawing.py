"""What is drawn from, through inference/text_to_image.py's class: runs, published files, folders, LoRAs."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.learning import scored_by
from families.common.pictures import to_pictures
from families.cosmos.components import find_transformer
from families.cosmos.exports import export_lora, to_diffusers, to_published
from families.cosmos.text_to_image import CosmosTextToImage
from families.registry import family_of
from tests.families.common.tiny_t5 import write_t5, write_tokenizer
from tests.families.cosmos.tiny_pipeline import transformer, write_cosmos, write_published
from tests.golden import load_case
from tests.warpcore.runs import tiny_settings, write_shard
from train.train_cosmos import TrainCosmos
from train.train_cosmos_lora import TrainCosmosLora
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
GIVEN = {
    "size": [32, 48], "steps": 2, "prompts": ["a red dog"], "seeds": [0, 7], "text_encoder_precision": "float32",
    "dtype": "float32", "device": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return write_cosmos(tmp_path_factory.mktemp("pipeline"))


def config_of(**settings) -> CosmosTextToImage.Config:
    return make_config(CosmosTextToImage.Config, GIVEN | settings)


def drawn(**settings) -> Tensor:
    config = config_of(**settings)
    prompts = [prompt for prompt in config.all_prompts for _ in config.seeds]
    return torch.stack(CosmosTextToImage(config).draw(prompts, config.seeds * len(config.all_prompts)).pictures)


def beside(pipeline: Path) -> dict:
    """The networks of a pipeline but its denoiser."""
    return {"autoencoder_checkpoint_path": pipeline, "text_encoder_checkpoint_path": pipeline}


def trained(kind: type, pipeline: Path, folder: Path, **settings) -> Path:
    data = write_shard(folder / "a.tar", 4)
    own = {
        "model_version": "mini", "generator_checkpoint_path": str(pipeline), "text_encoder_precision": "float32",
        "updates": 2, "save_every": 2, "sample_steps": 1, "sample_count": 1, "lr": 0.01,
    }  # fmt: skip
    assert kind(make_config(kind.Config, tiny_settings(folder, data, **own | settings))).run() == 0
    return folder / "tiny"


def test_a_folder_and_a_published_file_draw_the_same(pipeline, tmp_path):
    file = write_published(tmp_path / "model.pt", transformer())
    whole = drawn(generator_checkpoint_path=pipeline)
    assert whole.shape == (2, 3, 32, 48)
    assert not torch.equal(whole[0], whole[1])
    rounded = drawn(generator_checkpoint_path=file, **beside(pipeline))
    assert (whole - rounded).abs().max() < 0.1  # bfloat16 weights
    alone = drawn(generator_checkpoint_path=pipeline, seeds=[7])[0]
    torch.testing.assert_close(alone, whole[1], rtol=0, atol=1e-4)


def test_negative_prompts_and_guidance_count(pipeline):
    plain = drawn(generator_checkpoint_path=pipeline, seeds=[0])
    for change in ({"negative_prompt": "blurry"}, {"guidance": 1}, {"distill_steps": 2, "steps": None}):
        given = {key: value for key, value in (GIVEN | change).items() if value is not None}
        config = make_config(CosmosTextToImage.Config, given | {"generator_checkpoint_path": pipeline, "seeds": [0]})
        assert not torch.allclose(torch.stack(CosmosTextToImage(config).draw(["a red dog"], [0]).pictures), plain)


def test_a_prompt_of_any_length_is_drawn_and_told_where_it_is_cut(pipeline, caplog):
    drawn(generator_checkpoint_path=pipeline, prompts=["", "a red dog " * 2500], seeds=[0])
    (note,) = (record.getMessage() for record in caplog.records)
    assert "1 of 2 prompts are longer than the 32 tokens that the text encoder reads" in note


def test_a_run_is_drawn_from_and_exported(pipeline, tmp_path):
    run = trained(TrainCosmos, pipeline, tmp_path)
    expected = drawn(run=[run])
    assert not torch.allclose(expected, drawn(generator_checkpoint_path=pipeline))
    exact = ["export_dtype=float32"]
    to_published(run, tmp_path / "model.pt", exact)
    to_published(run, tmp_path / "model.safetensors", exact)
    to_diffusers(run, tmp_path / "folder", exact)
    for place in ("model.pt", "model.safetensors", "folder"):
        found = drawn(generator_checkpoint_path=tmp_path / place, **beside(pipeline))
        assert torch.equal(found, expected), place
    written = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(name.startswith("net.") for name in written)
    assert written["net.pos_embedder.seq"].tolist() == list(range(128))
    theirs = diffusers.CosmosTransformer3DModel.from_pretrained(tmp_path / "folder")
    own = find_transformer(tmp_path / "model.pt", "generator_checkpoint_path").tensors()
    assert all(torch.equal(tensor, own[name]) for name, tensor in theirs.state_dict().items())


def test_a_lora_is_trained_drawn_from_and_exported(pipeline, tmp_path):
    run = trained(TrainCosmosLora, pipeline, tmp_path, rank=2)
    with_lora = drawn(run=[run])
    plain = drawn(generator_checkpoint_path=pipeline)
    assert not torch.allclose(with_lora, plain)
    for kind in ("diffusers", "comfyui", "published"):
        file = tmp_path / f"{kind}.safetensors"
        export_lora(kind, run, file, [])
        found = drawn(generator_checkpoint_path=pipeline, lora=[str(file)])
        torch.testing.assert_close(found, with_lora, rtol=0, atol=1e-4)
        assert torch.equal(drawn(generator_checkpoint_path=pipeline, lora=[f"{file}:0"]), plain)
    to_published(run, tmp_path / "merged.pt", ["export_dtype=float32"])
    merged = drawn(generator_checkpoint_path=tmp_path / "merged.pt", **beside(pipeline))
    torch.testing.assert_close(merged, with_lora, rtol=0, atol=1e-4)


def test_a_run_is_scored_by_the_drawings_that_inference_makes_of_it(pipeline, tmp_path):
    run, sampling = trained(TrainCosmos, pipeline, tmp_path), {"steps": 2, "guidance": 4.0, "sampler": "res_2m"}
    kind, prompts = scored_by(family_of(run)), ["a red circle", "two blue stars"]
    settings = make_config(kind.Config, {"run": [run], "text_encoder_precision": "float32", "device": "cpu"})
    (ours,) = kind(settings, **sampling).draw(prompts, seed=3).values()
    given = GIVEN | {"run": [run], "prompts": prompts, "size": [128, 128]} | sampling
    theirs = CosmosTextToImage(make_config(CosmosTextToImage.Config, given)).draw(prompts, [3, 4])
    for one, other in zip(ours, theirs.pictures, strict=True):
        assert np.abs(one.astype(int) - to_pictures(other[None])[0]).max() <= 1


def write_others(folder: Path) -> None:
    """A T5 of another width, and autoencoders of other channels."""
    write_t5(folder / "text_encoder", width=32)
    write_tokenizer(folder / "tokenizer")
    wan = {"base_dim": 4, "num_res_blocks": 1, "z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    diffusers.AutoencoderKLWan(**wan).save_pretrained(folder / "wan")
    diffusers.AutoencoderKL(block_out_channels=(32,)).save_pretrained(folder / "other")


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("text_encoder_checkpoint_path", "text_encoder", "gives 32 numbers for each token, but the denoiser reads 16"),
        ("autoencoder_checkpoint_path", "wan", "gives 8 channels of latents, but the denoiser reads 16"),
        ("autoencoder_checkpoint_path", "other", "gives 4 channels of latents, but the denoiser reads 16"),
    ],
)
def test_networks_that_do_not_fit_the_denoiser_are_refused_before_weights_are_read(
    pipeline, tmp_path, key, name, message
):
    write_others(tmp_path)
    for file in tmp_path.glob(f"{name}/*.safetensors"):
        file.write_bytes(b"never read")
    given = {key: str(tmp_path / name)}
    with pytest.raises(UserError, match=f"^{key}: .*{message}"):
        CosmosTextToImage(config_of(generator_checkpoint_path=pipeline, **given))
    with pytest.raises(UserError, match=f"^{key}: .*{message}"):
        trained(TrainCosmos, pipeline, tmp_path, **given)


def test_published_sizes_follow_from_their_aspect_ratios():
    spec, _ = load_case("cosmos/resolutions")
    for ratio, (width, height) in spec["table"]["1024"].items():
        given = {key: value for key, value in GIVEN.items() if key != "size"}
        kind = CosmosTextToImage.Config
        config = kind.model_construct(**given, aspect_ratio=kind._ratio(ratio), model_version="2B")
        assert config.size_px == (height, width)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": [40, 48]}, "sides have to be multiples of 16 px, and at most 1920"),
        ({"size": [32, 1936]}, "at most 1920"),
        ({"seeds": [-1]}, "seeds: -1; write numbers from 0 to 4294967295"),
        ({"guidance": 1, "negative_prompt": "blurry"}, "negative_prompt: without guidance"),
        ({"distill_steps": 2}, "distill_steps fixes steps, guidance and sampler"),
    ],
)
def test_what_cannot_be_drawn_is_refused(pipeline, change, message):
    with pytest.raises((UserError, ConfigError), match=message):
        CosmosTextToImage(config_of(generator_checkpoint_path=pipeline, **change))
