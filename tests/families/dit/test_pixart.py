"""PixArt-alpha from a training to pictures and files: beside diffusers, which is another implementation."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from families.common import weight_source
from families.common.features import Origin
from families.common.library_networks import LibraryNetwork, adapt
from families.common.transformer_lora import built_with, open_loras
from families.dit.pixart_build import BLOCKS, denoiser, text_encoder
from families.dit.pixart_conditions import FEATURE, MASK, TEXT, told, without_text
from families.dit.pixart_config import PixartSettings
from families.dit.pixart_drawing import PixartNetworks
from families.dit.pixart_exports import export_lora, to_diffusers, to_published
from families.dit.pixart_files import find_denoiser
from families.dit.pixart_text_to_image import PixartTextToImageConfig
from families.dit.pixart_transformer import PixArtTransformer2DModel
from families.dit.pixart_versions import VERSIONS
from families.registry import family_of
from tests.caches import make_cache
from tests.families.dit.pixart import write_pixart
from tests.warpcore.runs import tiny_settings, write_shard
from train.train_pixart import TrainPixart
from train.train_pixart_lora import TrainPixartLora
from warpcore.config import load_config, make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
KEY = "generator_checkpoint_path"
UNCLEAN = "A <b>Circle</b> at www.shapes.com"
MULTI_SCALE = {"use_additional_conditions": True, "sample_size": 128, "interpolation_scale": 2}
MINI_NETWORKS = {"model_version": "mini", "text_encoder_precision": "float32"}
MINI = MINI_NETWORKS | {"sample_steps": 2, "image_size": 64}


def trained(case, folder, **settings):
    data = write_shard(folder / "data.tar", 8)
    settings = tiny_settings(folder, data, updates=1, save_every=1) | MINI | settings
    assert case(make_config(case.Config, settings)).run() == 0
    return folder / "tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(TrainPixart, tmp_path_factory.mktemp("pixart"))


@torch.no_grad()
def predicted(network) -> torch.Tensor:
    torch.manual_seed(0)
    x, text, mask = torch.randn(2, 16, 4, 4), torch.randn(2, 32, 64), torch.ones(2, 32)
    mask[0, 5:] = 0
    given, times = {"encoder_hidden_states": text, "encoder_attention_mask": mask}, torch.tensor([9, 700])
    if isinstance(network, LibraryNetwork):
        return network.eval()(x, times, **given)
    return network.eval()(x, timestep=times, **given).sample


def test_a_run_becomes_a_published_file_and_a_folder_that_diffusers_loads(run, tmp_path):
    to_published(run, tmp_path / "mini.pth", ["use_ema=false"])
    to_diffusers(tmp_path / "mini.pth", tmp_path / "folder", [])
    state = torch.load(tmp_path / "mini.pth", weights_only=True)["state_dict"]
    assert {"pos_embed", "y_embedder.y_embedding", "blocks.5.attn.qkv.bias"} <= state.keys()
    found = find_denoiser(run / "generator.safetensors", KEY)
    again = find_denoiser(tmp_path / "mini.pth", KEY)
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in found.tensors().items())
    network = PixArtTransformer2DModel(32, **{k: v for k, v in found.config.items() if not k.startswith("_")})
    network.load_state_dict(found.tensors())
    theirs = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(predicted(adapt(network, BLOCKS)), predicted(theirs), rtol=0, atol=1e-5)
    assert {family_of(path).name for path in (run, tmp_path / "mini.pth", tmp_path / "folder")} == {"pixart"}


@pytest.mark.parametrize("kind", ["diffusers", "kohya"])
def test_a_lora_is_trained_on_a_run_and_read_again_in_each_form(run, kind, tmp_path):
    lora = trained(TrainPixartLora, tmp_path, **{KEY: run / "generator.safetensors", "rank": 2})
    target = tmp_path / "lora.safetensors"
    export_lora(kind, lora, target, [])
    settings = [f"--{KEY}", str(run / "generator.safetensors"), "--lora"]
    drawn = []
    for path in (lora / "lora.safetensors", target):
        config = load_config(PixartTextToImageConfig, [*settings, str(path), "--prompts", "a circle"])
        drawn.append(predicted(built_with(denoiser, open_loras(denoiser, config.lora, config), config)))
    torch.testing.assert_close(*drawn, rtol=0, atol=1e-6)


@pytest.mark.parametrize("told_sizes", [False, True])
@torch.no_grad()
def test_drawings_by_ddim_are_those_of_diffusers(told_sizes, tmp_path):
    folder = write_pixart(tmp_path / "pipeline", **MULTI_SCALE if told_sizes else {})
    pipeline = diffusers.PixArtAlphaPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    prompts, version = ["a red circle", "a blue square on the left"], "XL/2-1024-MS" if told_sizes else "XL/2-256"
    noise = torch.randn(2, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    expected = pipeline(
        prompts, negative_prompt="", num_inference_steps=5, guidance_scale=3.0, height=32, width=48, latents=noise,
        output_type="latent", clean_caption=False, use_resolution_binning=False, max_sequence_length=120,
    ).images  # fmt: skip
    config = load_config(PixartTextToImageConfig, [
        f"--{KEY}", str(folder), "--model_version", version, "--prompts", "a", "--text_encoder_precision", "float32",
        "--device", "cpu",
    ])  # fmt: skip
    found = PixartNetworks(config, []).draw(
        prompts, "", (32, 48), [0, 1], noise=noise, steps=5, sampler="ddim", guidance=3.0
    )
    torch.testing.assert_close(torch.stack(found), expected, rtol=0, atol=1e-3)


def test_captions_are_cleaned_for_training_drawing_and_caches(tmp_path):
    data, cleaned = write_shard(tmp_path / "data" / "a.tar", 4), PixartSettings(**MINI_NETWORKS)
    settings = tiny_settings(tmp_path, data.parent, updates=1, save_every=1) | MINI
    encoder, plain = (text_encoder(one) for one in (cleaned, cleaned.model_copy(update={"clean_captions": False})))
    assert torch.equal(encoder([UNCLEAN]).hidden, plain(["a circle at"]).hidden)
    assert torch.equal(plain([UNCLEAN]).hidden, plain([UNCLEAN.lower()]).hidden)
    assert plain([UNCLEAN]).lengths > encoder([UNCLEAN]).lengths
    cache = make_cache("train_pixart", settings, tmp_path / "cache", "--features", "texts")
    settings |= {"webdataset_path": str(data.parent), "caches": [str(cache)]}
    with pytest.raises(UserError, match="clean_captions is True in the cache, False here"):
        TrainPixart(make_config(TrainPixart.Config, settings | {"clean_captions": False})).run()
    older = Path(shutil.copytree(cache, tmp_path / "older"))
    origin = Origin.read(str(older))
    settings_then = {name: one for name, one in origin.settings.items() if name != "clean_captions"}
    replace(origin, settings=settings_then).write(older)
    with pytest.raises(UserError, match="does not say which clean_captions it was made with, here it is True"):
        TrainPixart(make_config(TrainPixart.Config, settings | {"caches": [str(older)]})).run()
    assert TrainPixart(make_config(TrainPixart.Config, settings | {"sample_prompts": [UNCLEAN]})).run() == 0
    config = load_config(PixartTextToImageConfig, [f"--run={tmp_path / 'tiny'}", "--prompts=a", "--device=cpu"])
    read = PixartNetworks(config, []).read([UNCLEAN, "a circle at"])
    assert torch.equal(read[TEXT][0], read[TEXT][1])


def test_texts_from_a_cache_need_no_download_of_the_encoder_that_made_them(tmp_path, capsys, monkeypatch):
    name, here, there = "owner/t5", tmp_path / "here", tmp_path / "there"
    published, other = tmp_path / "published", tmp_path / "other"
    published.mkdir()
    other.mkdir()
    file = Path(shutil.copy(VERSIONS["mini"].text_encoder, published))
    with safe_open(file, "pt") as opened:
        tensors = {key: opened.get_tensor(key) * 1.5 for key in list(opened.keys())}
        save_file(tensors, other / file.name, opened.metadata())

    def downloads(source):
        def download(text, folder, root):
            asked.append(text)
            shutil.copytree(source, folder, dirs_exist_ok=True)
            sizes = {one.name: one.stat().st_size for one in source.iterdir()}
            (folder / weight_source.DONE).write_text(json.dumps(sizes), encoding="utf-8")

        monkeypatch.setattr(weight_source, "_download", download)

    asked = []
    downloads(published)
    monkeypatch.setattr(weight_source, "MODELS", here)
    data = write_shard(tmp_path / "data" / "a.tar", 4)
    settings = tiny_settings(tmp_path, data.parent, updates=1, save_every=1) | MINI
    settings |= {"text_encoder_checkpoint_path": name, "sample_prompts": ["a red circle"]}
    cache = make_cache("train_pixart", settings, tmp_path / "cache", "--features", "texts")
    assert asked == [name]
    assert Origin.read(str(cache)).networks["text"]["hub"] == name

    monkeypatch.setattr(weight_source, "MODELS", there)
    settings |= {"caches": [str(cache)]}
    assert TrainPixart(make_config(TrainPixart.Config, settings)).run() == 0
    assert asked == [name]
    said = capsys.readouterr().err
    assert "that it was made with the same weights of the text network was not checked: they are of owner/t5" in said
    wrong = settings | {"text_encoder_precision": "bfloat16", "experiment_id": "wrong"}
    with pytest.raises(UserError, match="of float32 in the cache, bfloat16 here"):
        TrainPixart(make_config(TrainPixart.Config, wrong)).run()

    further = settings | {"experiment_id": "further", "sample_prompts": ["a text that the cache lacks"]}
    downloads(other)
    with pytest.raises(UserError, match=r"the weights of the text network are t5\.safetensors"):
        TrainPixart(make_config(TrainPixart.Config, further)).run()
    assert asked == [name, name]
    shutil.rmtree(there)
    downloads(published)
    assert TrainPixart(make_config(TrainPixart.Config, further)).run() == 0
    assert asked == [name] * 3


def test_a_run_that_is_older_than_the_cleaning_of_captions_goes_on_without(tmp_path, capsys):
    class Before(TrainPixart):
        def build(self):
            networks, self.kept = super().build(), {}  # its checkpoints say nothing of the key
            return networks

    class Watched(TrainPixart):
        def build(self):
            networks = super().build()
            self.clean = networks["text"].clean
            return networks

    data = write_shard(tmp_path / "data" / "a.tar", 4)
    settings = tiny_settings(tmp_path, data.parent, updates=1, save_every=1) | MINI
    assert Before(make_config(TrainPixart.Config, settings | {"clean_captions": None})).run() == 0
    capsys.readouterr()
    for updates, given, expected in ((2, {}, None), (3, {}, None), (4, {"clean_captions": True}, True)):
        run = Watched(make_config(TrainPixart.Config, settings | given | {"updates": updates}))
        assert run.run() == 0
        assert run.config.clean_captions is expected
        assert run.clean(UNCLEAN) == ("a circle at" if expected else UNCLEAN)
        said = "clean_captions: null: this run is older than the key, and goes on as it began"
        assert (said in capsys.readouterr().err) == (expected is None)


def test_a_dropped_caption_is_the_networks_own_empty_text_behind_the_mask_of_the_caption():
    own = told({FEATURE: torch.randn(2, 3, 4), "text_lengths": torch.tensor([3, 1])}, 8)
    empty = torch.randn(8, 4)
    found = without_text(own, empty, {})
    assert torch.equal(found[TEXT], empty.expand(2, -1, -1))
    assert torch.equal(found[MASK], own[MASK])
    assert own[MASK].sum(dim=1).tolist() == [3, 1]


def test_an_update_is_that_of_a_plain_loop(tmp_path):
    """With AdamW, diffusers' network and the draws of the run; the loss of the variance is the process's own."""
    seen = {}

    class Recorded(TrainPixart):
        def loss(self, inputs, random):
            latents, conditions = inputs[0], self.with_dropout(inputs[1], random)
            network = self.networks["generator"]

            def predict(noised, t, **others):
                seen.update(noised=noised.clone(), t=t.clone(), conditions=conditions, before={
                    name: tensor.clone() for name, tensor in network.state_dict().items()
                })  # fmt: skip
                prediction = network(noised, t, **conditions)
                seen["grad_of"] = prediction
                prediction.retain_grad()
                return prediction

            return self.denoising_loss(latents, random, predict)

    folder = trained(Recorded, tmp_path, weight_decay=0.01, clip_grad_norm=None)
    numbers = find_denoiser(folder / "generator.safetensors", KEY).config
    network = diffusers.PixArtTransformer2DModel(**{k: v for k, v in numbers.items() if not k.startswith("_")})
    network.load_state_dict({name: t for name, t in seen["before"].items() if name != "y_embedding"})
    config = make_config(TrainPixart.Config, tiny_settings(tmp_path, "x") | MINI)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, betas=tuple(config.betas), eps=config.eps,
                                  weight_decay=0.01)  # fmt: skip
    text, mask = seen["conditions"][TEXT], seen["conditions"][MASK]
    made = network(seen["noised"], text, seen["t"], {"resolution": None, "aspect_ratio": None},
                   encoder_attention_mask=mask).sample  # fmt: skip
    assert F.mse_loss(made, seen["grad_of"].detach()).item() < 1e-10
    made.backward(seen["grad_of"].grad)
    optimizer.step()
    after = find_denoiser(folder / "generator.safetensors", KEY).tensors()
    for name, tensor in network.state_dict().items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-5)
