"""Texts by T5: recorded conditions, what pipelines with T5 hold, and what of them is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Config

from families.common.t5 import StandInTokenizer, T5TextEncoder
from families.common.text_conditions import Tokens
from families.common.weight_source import wanted
from families.registry import family_of
from families.stable_diffusion import build
from families.stable_diffusion.config import SdFinetuneConfig, SdSettings
from families.stable_diffusion.inference import SdInferenceSettings
from families.stable_diffusion.lora_config import SdLoraConfig
from families.stable_diffusion.t5_layers import T5Texts
from families.stable_diffusion.t5_texts import kind_of_projection, t5_texts
from tests.families.stable_diffusion.tiny_t5_pipeline import (
    SCALE,
    of_layer,
    texts_of,
    write_projection,
    write_t5_pipeline,
)
from tests.golden import load_case, resolve
from tools.cache_features import PIPELINE_PARTS, without_idle_weights
from train.train_sd import TrainSd
from warpcore.config import make_config
from warpcore.errors import UserError
from warpcore.meta import only_shapes

KEY = "generator_checkpoint_path"


@torch.no_grad()
def test_conditions_of_sdxl_are_those_of_the_published_pipeline():
    spec, tensors = load_case("sd_t5/t5_sdxl_prompt")
    parts = {}
    for name, tensor in tensors.items():
        if name.startswith("weights."):
            part, _, own = name.removeprefix("weights.").partition(".")
            parts.setdefault(part, {})[own] = tensor
    t5 = T5TextEncoder(T5Config(**spec["constructor"]["T5Config"]).to_dict(), StandInTokenizer(), 9, "states")
    t5.model.load_state_dict(parts["t5_encoder"], strict=False)
    t5.model.set_input_embeddings(t5.model.shared)
    texts = T5Texts(t5, of_layer(parts["t5_projection"]), of_layer(parts["t5_pooled_projection"]), 9)
    for call in spec["calls"]:
        ids, mask = resolve(call["args"], tensors)
        made, expected = texts.encode(Tokens(ids, mask.bool())), resolve(call["result"], tensors)
        torch.testing.assert_close(made.hidden, expected["tokens"], rtol=0, atol=call["suggested_atol"])
        torch.testing.assert_close(made.pooled, expected["pooled"], rtol=0, atol=call["suggested_atol"])


def test_longer_texts_are_cut_after_t5_has_read_them_and_shorter_ones_get_zeros():
    rows = [torch.ones(3, 4), torch.ones(9, 4), torch.ones(6, 4)]
    made = texts_of(rows, 6)
    assert made.hidden.sum(dim=2).bool().sum(dim=1).tolist() == made.lengths.tolist() == [3, 6, 6]
    assert made.hidden.shape == (3, 6, 4)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {version: write_t5_pipeline(tmp_path_factory.mktemp(version), version) for version in ("sd15", "sdxl")}


def settings(folder, version="sd15", **changes) -> SdSettings:
    known = {KEY: str(folder), "model_version": version, "text_model": "t5", "text_tokens": 12}
    return make_config(SdSettings, known | changes)


def test_a_pipeline_says_that_it_has_t5_and_how_long_its_texts_are(folders):
    for version, folder in folders.items():
        assert family_of(folder).name == "stable_diffusion"
        found = make_config(SdInferenceSettings, {KEY: str(folder)})
        assert (found.model_version, found.text_model, found.text_tokens) == (version, "t5", 12)
        with pytest.raises(UserError, match="was trained with T5; write text_model: t5"):
            build.generator_source(settings(folder, version, text_model="clip", text_tokens=256))
        with pytest.raises(UserError, match="was trained with T5; write text_model: t5"):
            build.unet(make_config(SdInferenceSettings, {KEY: str(folder), "text_model": "clip"}))


def test_states_are_projected_and_scaled(folders):
    layer = load_file(folders["sd15"] / "t5_projection" / "diffusion_pytorch_model.safetensors")
    texts = build.text_encoders(settings(folders["sd15"]))
    made = texts(["a red dog", ""])
    states = texts.t5(["a red dog", ""]).hidden
    expected = (states[0] @ layer["weight"].T + layer["bias"]) * SCALE
    assert made.hidden.shape == (2, 12, 16)
    length = made.lengths[0]
    torch.testing.assert_close(made.hidden[0, :length], expected[:length])
    assert not made.hidden[0, length:].any()
    assert made.lengths[1] == 1  # its end token
    assert not made.hidden[1, 1:].any()
    assert texts.are_cut(["a b c d e f g h i j k", "a b c d e f g h i j k l"]) == [False, True]


def test_without_a_file_the_projection_is_random_and_the_same_in_every_run(folders):
    alone = settings(folders["sd15"] / "unet", text_encoder_checkpoint_path=str(folders["sd15"] / "text_encoder"))
    first, second = (build.text_encoders(alone)(["a red dog"]).hidden for _ in range(2))
    assert torch.equal(first, second)
    assert first.std() > 0
    given = build.text_encoders(
        settings(
            folders["sd15"] / "unet",
            text_encoder_checkpoint_path=str(folders["sd15"] / "text_encoder"),
            text_projection_checkpoint_path=str(folders["sd15"] / "t5_projection"),
        )
    )
    assert torch.equal(
        given(["a red dog"]).hidden, build.text_encoders(settings(folders["sd15"]))(["a red dog"]).hidden
    )


def test_a_file_goes_on_saying_which_projection_its_u_net_was_trained_with(folders, tmp_path):
    assert kind_of_projection(settings(folders["sd15"])) == "file"
    assert kind_of_projection(settings(folders["sd15"] / "unet")) == "random"
    for said in ("file", "random"):
        save_file({"a": torch.ones(1)}, file := tmp_path / f"{said}.safetensors", {"text_projection": said})
        assert kind_of_projection(settings(file)) == said


def test_only_shapes_need_no_files():
    for version, widths in (("sd15", (768, None)), ("sdxl", (2048, 1280))):
        with only_shapes():
            texts = build.text_encoders(make_config(SdSettings, {"model_version": version, "text_model": "t5"}))
        assert all(parameter.is_meta for parameter in texts.parameters())
        made = texts(["a red dog"])
        assert made.hidden.shape == (1, 256, widths[0])
        assert (made.pooled is None) if widths[1] is None else made.pooled.shape == (1, widths[1])
        assert texts.t5.model.num_parameters() == 4_762_310_656


@pytest.mark.parametrize(("config", "tensors", "message"), [
    ({"hidden_dim": 7}, {}, "has hidden_dim, which is not known here"),
    ({"scaling_factor": "big"}, {}, "scaling_factor is 'big', not a number"),
    ({}, {"norm.weight": torch.ones(16)}, "only in the file"),
    ({}, {"bias": torch.ones(7)}, r"bias is \(7,\) in the file"),
])  # fmt: skip
def test_a_projection_of_another_kind_is_refused_by_name(folders, tmp_path, config, tensors, message):
    write_projection(tmp_path, 16, **config) if config else write_projection(tmp_path, 16)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | tensors, file)
    with pytest.raises(UserError, match=message):
        build.text_encoders(settings(folders["sd15"], text_projection_checkpoint_path=str(tmp_path)))


def test_a_layer_that_has_a_name_in_its_module_is_read(folders, tmp_path):
    write_projection(tmp_path, 16)
    plain = build.text_encoders(settings(folders["sd15"], text_projection_checkpoint_path=str(tmp_path)))
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({f"proj.{name}": tensor for name, tensor in load_file(file).items()}, file)
    named = build.text_encoders(settings(folders["sd15"], text_projection_checkpoint_path=str(tmp_path)))
    assert torch.equal(plain.text.weight, named.text.weight)


@pytest.mark.parametrize(("version", "numbers", "message"), [
    ("sd15", {"cross_attention_dim": None}, "its cross_attention_dim is None, not a number above 0"),
    ("sd15", {"cross_attention_dim": 10**12}, "its cross_attention_dim is 1000000000000, not a number .* up to 65536"),
    ("sd15", {"cross_attention_dim": [8, 8]}, r"its cross_attention_dim is \[8, 8\], not a number"),
    ("sdxl", {"addition_time_embed_dim": None}, "its addition_time_embed_dim is None"),
    ("sdxl", {"projection_class_embeddings_input_dim": 48}, "its projection_class_.* is 48, not a number above 48"),
])  # fmt: skip
def test_a_u_net_that_does_not_say_how_wide_its_texts_are_is_refused(version, numbers, message):
    found = make_config(SdSettings, {"model_version": version, "text_model": "t5"})
    unet = {"cross_attention_dim": 8, "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60}
    unet = {name: number for name, number in (unet | numbers).items() if number is not None}
    with only_shapes(), pytest.raises(UserError, match=message):
        t5_texts(found, unet)


def test_unknown_parts_of_a_pipeline_and_missing_projections_are_named(folders, tmp_path):
    index = json.loads((folders["sd15"] / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"mind_reader": ["pipeline", "Mind"]}))
    with pytest.raises(UserError, match="has a part mind_reader"):
        build.generator_source(settings(tmp_path))
    with pytest.raises(UserError, match="holds no folder t5_projection"):
        build.text_encoders(settings(folders["sd15"], text_projection_checkpoint_path=str(tmp_path)))


@pytest.mark.parametrize(("kind", "changes", "message"), [
    (SdFinetuneConfig, {"train_text_encoder": True}, "T5 is not trained"),
    (SdLoraConfig, {"text_encoder_filters": ["mlp"], KEY: "somewhere"}, "a LoRA is of the U-Net alone"),
    (SdLoraConfig, {"train_tokens": [["[x]", "^a"]], KEY: "somewhere"}, "a LoRA is of the U-Net alone"),
    (SdSettings, {"text_chunks": 2}, "text_chunks is not for text_model: t5"),
    (SdSettings, {"text_model": "clip", "text_tokens": 77}, "text_tokens is not for text_model: clip"),
])  # fmt: skip
def test_keys_that_do_not_go_with_t5_are_refused(kind, changes, message):
    needed = {"experiment_id": "x", "checkpoint_path": "x", "updates": 1, "batch_size": 1, "webdataset_path": "x"}
    needed |= {"model_version": "sd15", "image_size": 64}
    needed |= {"module_filters": ["to_q"], "rank": 2} if kind is SdLoraConfig else {}
    needed = {} if kind is SdSettings else needed
    with pytest.raises(UserError, match=message):
        make_config(kind, needed | {"text_model": "t5"} | changes)


def test_the_scale_of_another_autoencoder_is_its_own(folders, tmp_path):
    """A file that does not say which autoencoder it is, is what the config says, else that of the U-Net's version."""
    weights = tmp_path / "vae.safetensors"
    save_file(load_file(folders["sd15"] / "vae" / "diffusion_pytorch_model.safetensors"), weights)
    for said, scale in ((None, 0.18215), ("sdxl", 0.13025)):
        found = build.latents_of(
            settings(folders["sd15"], autoencoder_checkpoint_path=str(weights), autoencoder_version=said)
        )
        assert found[0].apply(torch.ones(1, 4, 1, 1)).mean().item() == pytest.approx(scale)
    folder = settings(folders["sd15"], autoencoder_checkpoint_path=str(folders["sdxl"] / "vae"))
    assert build.latents_of(folder)[0].apply(torch.ones(1, 4, 1, 1)).mean().item() == pytest.approx(0.13025)


def test_for_a_cache_of_texts_all_is_downloaded_that_makes_them():
    given = {
        "experiment_id": "a", "checkpoint_path": "runs", "updates": 1, "batch_size": 1, "webdataset_path": "a.tar",
        KEY: "owner/pipeline", "autoencoder_checkpoint_path": "owner/vae", "text_model": "t5",
        "text_encoder_checkpoint_path": "owner/t5",
    }  # fmt: skip

    def kept(features: str, **changes: str) -> set[str]:
        config = without_idle_weights(TrainSd, make_config(TrainSd.Config, given | changes), features)
        return {key for key, path in config if key.endswith("_checkpoint_path") and path is not None}

    text, projection = "text_encoder_checkpoint_path", "text_projection_checkpoint_path"
    assert kept("texts", **{projection: "owner/layer"}) == {text, projection}
    assert kept("texts") == {text, KEY, "autoencoder_checkpoint_path"}  # the projection stands beside the U-Net
    assert kept("latents") == kept("latents", **{projection: "owner/layer"}) == {KEY, "autoencoder_checkpoint_path"}
    parts = ("unet", "vae", "tokenizer", "t5_encoder", "t5_projection", "t5_pooled_projection")
    files = {"model_index.json": 1} | {f"{part}/model.safetensors": 1 for part in parts}
    chosen = set(wanted(files, "", "owner/pipeline", PIPELINE_PARTS["texts"]))
    assert chosen == files.keys() - {"unet/model.safetensors", "vae/model.safetensors"}
