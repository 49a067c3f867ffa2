"""REPA: the alignment is the published formula, and teaches the blocks up to the one that it looks at."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from families.common.library_networks import adapt
from families.common.patch_encoders import patch_encoder, patch_width
from families.common.techniques.repa import HiddenTokens, Projector, RepaSettings, alignment
from families.common.techniques.tread import TokenRouting, TreadSettings, kept_tokens
from modules.clip import ClipSettings, ImageTower, TextTower
from tests.families.common.techniques.tiny_transformer import TinyTransformer, tiny_inputs
from tests.families.common.tiny_unets import SD15, unet
from warpcore.errors import UserError
from warpcore.meta import only_shapes
from warpcore.random import SampleRandom

SETTINGS = RepaSettings(block=2, projector_width=16)
VISION = {"width": 16, "head_width": 8, "layers": 2, "image_size": 16, "patch_size": 8}


def test_the_alignment_is_that_of_the_paper():
    torch.manual_seed(0)
    projector, x, patches = Projector(8, 16, 6), torch.randn(2, 5, 8), torch.randn(2, 5, 6)
    one, two, three = projector.mlp.layers
    assert [layer.out_features for layer in (one, two, three)] == [16, 16, 6]
    made = three(torch.nn.SiLU()(two(torch.nn.SiLU()(one(x)))))
    expected = torch.zeros(2)
    for place in range(2):
        for token in range(5):
            a, b = made[place, token], patches[place, token]
            expected[place] -= (a @ b / (a.norm() * b.norm())) / 5
    torch.testing.assert_close(alignment(projector(x), patches).mean(dim=1), expected)


def test_its_gradient_reaches_the_blocks_up_to_its_own_and_no_other():
    network, given = TinyTransformer().train(), tiny_inputs()
    hidden, projector = HiddenTokens(network, SETTINGS), Projector(8, 16, 6)
    with hidden.taken():
        network(**given)
    tokens, places = hidden.release()
    assert places is None
    alignment(projector(tokens), torch.randn(3, 10, 6)).mean().backward()
    assert hidden.tokens is None
    reached = [any(parameter.grad is not None for parameter in block.parameters()) for block in network.blocks]
    assert reached == [True, True, False, False, False]
    assert all(parameter.grad is not None for parameter in projector.parameters())
    network(**given)
    assert hidden.tokens is None  # nothing is kept while it draws


def test_tokens_that_skip_the_block_are_not_aligned():
    network, random = TinyTransformer().train(), SampleRandom([1, 2, 3])
    routing = TokenRouting(network, TreadSettings(start=1, end=3))
    inside, behind = (
        HiddenTokens(network, RepaSettings(block=block), routing) for block in (2, 3)
    )  # the second looks where the tokens are back
    with routing.drawn(random), inside.taken(), behind.taken():
        network(**tiny_inputs())
        assert torch.equal(inside.places, kept_tokens(random, 10, 0.5))
        assert inside.tokens.shape == (3, 5, 8)
        assert behind.tokens.shape == (3, 10, 8)
        assert behind.places is None


def test_the_published_block_fits_other_depths():
    assert [RepaSettings().block_of(depth) for depth in (28, 12, 6, 1)] == [8, 3, 2, 1]
    with pytest.raises(UserError, match="block 7 of 6: write a block from 1 to 6"):
        RepaSettings(block=7).block_of(6)
    with pytest.raises(UserError, match="UNet2DConditionModel is none; remove the key"):
        HiddenTokens(adapt(unet(SD15)), SETTINGS)


def dinov2(folder) -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    model = Dinov2Model(config).eval()
    model.save_pretrained(folder)
    return model


def test_the_patches_of_dinov2_are_those_of_transformers(tmp_path):
    model, encoder = dinov2(tmp_path), patch_encoder(tmp_path, "repa.encoder")
    images = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    pixels = torch.nn.functional.interpolate((images / 255 - mean) / std, (28, 42), mode="bicubic")
    with torch.no_grad():
        expected = model(pixels).last_hidden_state[:, 1:]
        found = encoder(images, (2, 3))
    assert encoder.width == patch_width(tmp_path, "repa.encoder") == found.shape[2] == 12
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_patches_of_an_image_tower_are_those_of_open_clip(tmp_path):
    torch.manual_seed(0)
    tower = ImageTower(ClipSettings(embed_dim=8, vision_cfg=VISION)).eval()
    tower.save(tmp_path / "image.safetensors")
    encoder = patch_encoder(tmp_path / "image.safetensors", "repa.encoder")
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        pixels = tower.preprocess(images / 255)
        made = tower.model.forward_intermediates(
            pixels, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        expected = made["image_intermediates"][-1]
        torch.testing.assert_close(encoder(images, (2, 2)), expected, rtol=1e-4, atol=1e-5)
        assert encoder(images, (3, 5)).shape == (2, 15, 16)  # positions are interpolated
    assert encoder.width == patch_width(tmp_path / "image.safetensors", "repa.encoder") == 16


def test_what_is_no_image_encoder_is_refused_by_name(tmp_path):
    text = {"width": 16, "heads": 2, "layers": 1, "context_length": 8}
    TextTower(ClipSettings(embed_dim=8, text_cfg=text, words=["a"])).save(tmp_path / "text.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "broken.safetensors").write_bytes(b"no weights")
    for name, message in (
        ("text.safetensors", "holds a text tower"), ("empty", "is neither a folder of transformers with a DINOv2"),
        ("vit", "that of 'vit', not of dinov2"), ("broken.safetensors", "cannot be read"),
        ("missing", "does not exist"),
    ):  # fmt: skip
        for function in (patch_encoder, patch_width):
            with pytest.raises(UserError, match=f"repa.encoder: .*{message}"):
                function(tmp_path / name, "repa.encoder")
    with only_shapes():
        assert patch_width(tmp_path / "missing", "repa.encoder") == 768
