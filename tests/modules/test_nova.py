"""NOVA's networks compute what the reference does, part by part, and their state is that of published files."""

import pytest
import torch
from torch import Tensor

from modules.nova import SIZES, NOVATransformer
from modules.nova_decoder import patchify, time_sines, unpatchify
from modules.nova_embeddings import LabelEmbedding, TextEmbedding, grid_places
from modules.nova_encoders import ClipState, KeptKeys, frame_mask
from modules.stdit_parts import rotate
from tests.golden import load_case, load_manifest, resolve, weights_of
from tests.small_nova import golden_nova, load_nova

PICTURES, VIDEOS, ROTARY = "transformer_t2i_small", "transformer_t2v_small", "transformer_rope_small"


class Golden:
    """Calls of a case, each with what it is given and what comes out."""

    def __init__(self, case: str):
        self.calls, self.tensors = load_nova(case)
        self.network = golden_nova(case) if case.startswith("transformer") else None

    def given(self, name: str) -> dict:
        return resolve(self.calls[name].get("kwargs", {}), self.tensors)

    def agrees(self, found: Tensor, name: str) -> None:
        call = self.calls[name]
        expected = resolve(call["result"], self.tensors)
        torch.testing.assert_close(found, expected, rtol=0, atol=call["result_stats"]["suggested_atol"])


@torch.no_grad()
def test_parts_of_the_network_of_pictures_compute_what_those_of_the_reference_do():
    golden = Golden(PICTURES)
    network, given = golden.network, golden.given
    text = given("text_embed")["x"]
    golden.agrees(network.text_embed(text, torch.full((len(text),), text.shape[1])), "text_embed")
    golden.agrees(network.condition(text, torch.full((len(text),), text.shape[1])), "text_embed")
    for name in ("video_encoder.patch_embed", "image_encoder.patch_embed"):
        golden.agrees(network.get_submodule(name)(given(name)["x"]), name)
    golden.agrees(network.image_encoder.pos_embed(given("image_encoder.pos_embed")["x"]), "image_encoder.pos_embed")
    golden.agrees(network.video_pos_embed(given("video_pos_embed")["x"]), "video_pos_embed")
    x, c = (given("video_encoder")[key] for key in ("x", "c"))
    golden.agrees(network.video_encoder.encoded(x, c), "video_encoder")
    golden.agrees(patchify(given("patchify")["x"], 2), "patchify")
    golden.agrees(unpatchify(given("unpatchify")["tokens"], (4, 6), 2), "unpatchify")


@pytest.mark.parametrize("name", ["all_tokens", "prev_ids", "no_prev_ids", "no_condition"])
@torch.no_grad()
def test_the_image_encoder_reads_the_tokens_that_are_there(name):
    golden = Golden(PICTURES)
    given = golden.given(f"image_encoder.{name}")
    x, visible = given["x"], given.get("prev_ids")
    encoder = golden.network.image_encoder
    condition = given.get("c", x[:, :0])
    found = encoder(encoder.pos_embed(x), condition, None if visible is None else visible[..., 0], (4, 6))
    golden.agrees(found, f"image_encoder.{name}")


@torch.no_grad()
def test_the_diffusion_head_is_that_of_the_reference_with_times_of_tokens_and_of_samples():
    golden = Golden(PICTURES)
    head = golden.network.image_decoder
    golden.agrees(time_sines(golden.given("frequencies")["timestep"]), "frequencies")
    given = golden.given("time_cond_embed.per_sample")
    golden.agrees(head.time_cond_embed(given["timestep"], given["z"]), "time_cond_embed.per_sample")
    for name in ("image_decoder.per_token", "image_decoder.per_sample"):
        given = golden.given(name)
        golden.agrees(golden.network.denoise(patchify(given["x"], 2), given["timestep"], given["z"]), name)


@torch.no_grad()
def test_parts_of_the_network_of_videos_compute_what_those_of_the_reference_do():
    golden = Golden(VIDEOS)
    network, given = golden.network, golden.given
    for frames in (1, 3, 5, 9):
        golden.agrees(network.video_pos_embed.times(frames), f"time_embed_{frames}")
    golden.agrees(network.video_pos_embed(given("video_pos_embed")["x"]), "video_pos_embed")
    for name in ("motion_flow", "motion_flow_fps"):
        numbers = {key: torch.tensor(value) for key, value in given(name).items() if key != "c"}
        golden.agrees(network.motion_embed(**numbers), name)
    golden.agrees(network.video_encoder.mixer(*given("mixer").values()), "mixer")
    golden.agrees(network.video_encoder.patch_embed(given("patch_embed_5d")["x"]), "patch_embed_5d")
    expected = resolve(golden.calls["attn_mask"]["result"], golden.tensors)
    assert torch.equal(frame_mask(9, 3, 6, torch.device("cpu")), expected == 0)


@torch.no_grad()
def test_frames_one_by_one_are_those_at_once():
    golden = Golden(VIDEOS)
    x, c = golden.given("video_encoder.kv_cache").values()
    encoder = golden.network.video_encoder
    at_once = encoder.encoded(x, c, frame_mask(9, 3, 6, x.device))
    golden.agrees(at_once, "video_encoder.block_causal")
    keys = [KeptKeys() for _ in encoder.blocks]
    frames = x.split(6, dim=1)
    one_by_one = [
        encoder.encoded(frame, c if i == 0 else c[:, :0], keys=keys) for i, frame in enumerate(frames)
    ]  # fmt: skip
    golden.agrees(torch.cat(one_by_one, dim=1), "video_encoder.kv_cache")


@pytest.mark.parametrize("case", [VIDEOS, ROTARY])
@torch.no_grad()
def test_a_clip_that_is_drawn_is_encoded_as_in_training(case):
    network = golden_nova(case)
    latents = torch.randn(2, 4, 3, *(4 * side for side in network.video_base_size[1:]))
    text, flow = torch.randn(2, 4, 20), torch.tensor([5.0, 2.0])
    condition = network.condition(text, torch.tensor([4, 0]), flow=flow)
    at_once = network.encode_clip(latents, condition)
    clip = ClipState(3)
    for i, expected in enumerate(at_once.unbind(1)):
        found = network.encode_frame(latents[:, :, i - 1] if i else None, condition, clip)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    other = latents.clone()
    other[:, :, 1] += 1
    changed = (network.encode_clip(other, condition) - at_once).flatten(2).abs().amax(2)
    assert not changed[:, :2].any()  # a frame is told of earlier ones alone
    assert changed[:, 2].all()


@torch.no_grad()
def test_rotary_positions_are_those_of_the_reference():
    golden = Golden(ROTARY)
    network, given = golden.network, golden.given
    places = grid_places(range(2), 1, 2, torch.device("cpu"))
    golden.agrees(places[None], "positions")
    turned = rotate(given("rotate")["q"], network.video_encoder.rope(grid_places(range(2), 1, 2, places.device, 6)))
    golden.agrees(turned, "rotate")
    x, c = given("video_encoder").values()
    frames = x.unflatten(1, (2, 2))
    mask = network.video_encoder.rope(grid_places(range(2), 1, 2, x.device, c.shape[1]))
    golden.agrees(network.video_encoder.encoded(frames.flatten(1, 2), c, None, mask), "video_encoder")
    picture = given("image_encoder")
    found = network.image_encoder(picture["x"], picture["c"], picture["prev_ids"][..., 0], (2, 4))
    golden.agrees(found, "image_encoder")
    golden.agrees(network.video_encoder.mixer(*given("mixer").values()), "mixer")


@torch.no_grad()
def test_texts_are_filled_up_with_the_rows_of_the_empty_one_and_dropped_ones_are_the_empty_one():
    golden, spec = Golden("text_embed"), load_case("nova/text_embed")[0]
    numbers = spec["constructor"]
    embedding = TextEmbedding(numbers["token_dim"], numbers["embed_dim"], numbers["num_tokens"])
    embedding.load_state_dict(weights_of(spec, golden.tensors))
    for name in ("encode_prompts", "forward", "encode_prompts_training"):
        (prompts,) = resolve(golden.calls[name]["args"], golden.tensors)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        text = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=torch.nan)
        golden.agrees(embedding(text, lengths) if name == "forward" else embedding.filled(text, lengths), name)
    dropped = embedding.filled(text, torch.zeros_like(lengths))
    assert torch.equal(dropped, embedding.weight[:6].expand(len(lengths), -1, -1))
    with pytest.raises(ValueError, match="text of 7 tokens: text_token_len is 6"):
        embedding(torch.zeros(1, 7, 12), torch.tensor([7]))


@torch.no_grad()
def test_classes_are_embedded_as_the_reference_does():
    golden, spec = Golden("label_embed"), load_case("nova/label_embed")[0]
    embedding = LabelEmbedding(spec["constructor"]["num_classes"], spec["constructor"]["embed_dim"])
    embedding.load_state_dict(weights_of(spec, golden.tensors))
    (labels,) = resolve(golden.calls["labels"]["args"], golden.tensors)
    golden.agrees(embedding(labels), "labels")
    (labels,) = resolve(golden.calls["labels_training"]["args"], golden.tensors)
    kept = resolve(golden.calls["labels_training"]["draws"]["uniform"], golden.tensors)[:, 0] > 0.1
    assert not kept.all()
    golden.agrees(embedding(torch.where(kept, labels, spec["constructor"]["num_classes"])), "labels_training")


@pytest.mark.parametrize(
    ("size", "manifest"),
    zip(SIZES, ["d48w768_sdxl1024", "d48w1024_sdxl1024", "d48w1536_sdxl1024", "d48w1024_sd512", "d48w1024_osp480",
                "d48w1024_osp480_mixer24"], strict=True),
)  # fmt: skip
def test_published_networks_have_the_tensors_of_their_files(size, manifest):
    manifest = load_manifest(f"nova_{manifest}", "nova")
    with torch.device("meta"):
        network, told = NOVATransformer(**SIZES[size]), NOVATransformer(**manifest["constructor"])
    for one in (network, told):
        found = {name: tuple(tensor.shape) for name, tensor in one.state_dict().items()}
        assert found == {name: tuple(tensor["shape"]) for name, tensor in manifest["tensors"].items()}
    assert sum(parameter.numel() for parameter in network.parameters()) == manifest["parameter_count"]
    assert [name for name, _ in network.named_buffers()] == manifest["buffers"]


def training_inputs(network: NOVATransformer) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.ones(6, 24, dtype=torch.bool)
    visible = torch.tensor([[3, 0], [1, 2], [5, 4], [7, 9], [11, 20], [23, 22]])
    hidden = hidden.scatter(1, visible, False)
    latents, noised = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 3, 8, 12), (12, 24, 16)))
    text = torch.randn(2, 7, 20, generator=generator)
    inputs = latents, hidden, visible, noised, torch.rand(12, 24, generator=generator) * 1000
    return inputs, {"text": text, "lengths": torch.tensor([7, 3]), "flow": torch.tensor([5.0, 1.0])}


def test_checkpointing_has_the_published_levels_and_changes_no_gradient():
    network = golden_nova(VIDEOS)
    inputs, conditions = training_inputs(network)

    def gradients() -> list[Tensor]:
        return torch.autograd.grad(network(*inputs, **conditions).square().sum(), list(network.parameters()))

    plain = gradients()
    for level, (video, image, head) in {1: (2, 0, 0), 2: (2, 4, 0), 3: (2, 4, 2), 0: (0, 0, 0)}.items():
        network.set_activation_checkpointing(level)
        parts = network.video_encoder, network.image_encoder, network.image_decoder
        assert [sum(block.checkpointed for block in part.blocks) for part in parts] == [video, image, head]
        for one, other in zip(plain, gradients() if level == 3 else plain, strict=True):
            torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="level 4 does not exist"):
        network.set_activation_checkpointing(4)


@torch.no_grad()
def test_hidden_tokens_and_their_order_have_no_influence():
    network = golden_nova(PICTURES)
    latents, condition = torch.randn(1, 4, 8, 12), torch.randn(1, 6, 32)
    visible = torch.tensor([[3, 8, 20]])
    hidden = torch.ones(1, 24, dtype=torch.bool).scatter(1, visible, False)
    found = network.encode_picture(latents, hidden, visible, condition)
    other = unpatchify(torch.where(hidden[..., None], 7.0, patchify(latents, 2)), (4, 6), 2)
    torch.testing.assert_close(network.encode_picture(other, hidden, visible.flip(1), condition), found)
    other = unpatchify(torch.where(hidden[..., None], patchify(latents, 2), 7.0), (4, 6), 2)
    assert not torch.allclose(network.encode_picture(other, hidden, visible, condition), found, atol=1e-3)


def test_what_does_not_fit_is_refused():
    given = {"image_base_size": (4, 6), "video_base_size": (1, 2, 3)}
    with pytest.raises(ValueError, match="'vit_d16w800' is unknown"):
        NOVATransformer(("vit_d16w800", "vit_d16w800", "mlp_d6w768"), **given)
    small = {"depth": 1, "embed_dim": 32, "num_heads": 2}
    with pytest.raises(ValueError, match="widths 32 and 64"):
        NOVATransformer((small, small | {"embed_dim": 64}, {"depth": 1, "embed_dim": 8}), **given)
    with pytest.raises(ValueError, match="not half of image_base_size"):
        NOVATransformer((small, small, {"depth": 1, "embed_dim": 8}), (4, 6), (1, 4, 6))
    with pytest.raises(ValueError, match=r"is \[64, 96\] px"):
        NOVATransformer((small, small, {"depth": 1, "embed_dim": 8}), **given, image_size=64)
    network = golden_nova(PICTURES)
    hidden = torch.zeros(1, 32, dtype=torch.bool)
    with pytest.raises(ValueError, match="frames of 4 x 8 tokens: this network has positions for 4 x 6 alone"):
        network.encode_picture(torch.zeros(1, 4, 8, 16), hidden, torch.arange(32)[None], torch.zeros(1, 6, 32))
