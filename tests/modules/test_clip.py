"""The CLIP towers against the golden numbers, against transformers, and in front of wrong files."""

import open_clip
import pytest
import torch
import transformers
from torch import nn

from modules.clip import ClipSettings, ImageTower, TextTower, image_tower, text_tower
from modules.clip_weights import convert_hugging_face
from modules.tokenizers import split_words
from tests.golden import load_case, weights_of

WORDS = ["a", "blue", "circle", "left", "of", "red", "square", ","]
SMALL = ClipSettings(
    embed_dim=24,
    text_cfg={"width": 32, "heads": 2, "layers": 2, "context_length": 12, "vocab_size": 50, "mlp_ratio": 2.0},
    vision_cfg={"width": 32, "head_width": 16, "layers": 2, "image_size": 32, "patch_size": 8, "mlp_ratio": 2.0},
    begin_id=48,
    end_id=49,
)
MINI = ClipSettings(
    embed_dim=64,
    text_cfg={"width": 64, "heads": 2, "layers": 2, "context_length": 24},
    vision_cfg={"width": 64, "head_width": 32, "layers": 2, "image_size": 64, "patch_size": 16},
    words=WORDS,
)


def golden_tower(case: str) -> tuple[TextTower, dict, dict]:
    spec, tensors = load_case(case)
    config = spec["config"]
    settings = ClipSettings(
        embed_dim=config["projection_dim"],
        text_cfg={
            "width": config["hidden_size"],
            "heads": config["num_attention_heads"],
            "layers": config["num_hidden_layers"],
            "context_length": config["max_position_embeddings"],
            "vocab_size": config["vocab_size"],
            "mlp_ratio": config["intermediate_size"] / config["hidden_size"],
        },
        quick_gelu=config["hidden_act"] == "quick_gelu",
        begin_id=config["begin_token_id"],
        end_id=config["end_token_id"],
    )
    tower = TextTower(settings).eval()
    tower.model.load_state_dict(convert_hugging_face(weights_of(spec, tensors)), strict=True)
    return tower, spec, tensors


def test_text_tower_computes_the_golden_conditions():
    tower, spec, tensors = golden_tower("clip_text_gelu")
    for call in spec["calls"]:
        name, outputs, atol = call["name"], call["outputs"], call["result_stats"]["suggested_atol"]
        if name.startswith("added_token"):
            rows = torch.cat([tower.token_embedding.weight[:80], tensors["in.added_token_row"]])
            tower.model.token_embedding = nn.Embedding.from_pretrained(rows)
        mask = None if call["attention_mask"] is None else tensors[call["attention_mask"]]
        with torch.no_grad():
            hidden, pooled = tower.encode(tensors[call["input_ids"]], mask)
        expected = {key: tensors[value] for key, value in outputs.items()}
        torch.testing.assert_close(hidden, expected["clip_text (hidden_states[-1])"], rtol=0, atol=atol)
        if name == "added_token_legacy_pooling":  # published files pool at the added token; we pool at the end token
            expected["clip_text_pooled (text_embeds)"] = tensors["out.added_token_end_pooling.text_embeds"]
        torch.testing.assert_close(pooled, expected["clip_text_pooled (text_embeds)"], rtol=0, atol=atol)


def hugging_face_clip(quick_gelu: bool) -> transformers.CLIPModel:
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    common["hidden_act"] = "quick_gelu" if quick_gelu else "gelu"
    text = {"vocab_size": 50, "max_position_embeddings": 12, "bos_token_id": 48, "eos_token_id": 49, **common}
    vision = {"image_size": 32, "patch_size": 8, **common}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    ).eval()
    with torch.no_grad():  # the default initialisation is too small for a wrong layer to show
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_towers_agree_with_transformers_on_its_own_file(tmp_path, quick_gelu):
    torch.manual_seed(0)
    theirs = hugging_face_clip(quick_gelu)
    theirs.save_pretrained(tmp_path)
    settings = ClipSettings(**{**vars(SMALL), "quick_gelu": quick_gelu})

    ids = torch.randint(0, 48, (3, 12))
    ids[0, 5:], ids[1, 11:], ids[2, 3:] = 49, 49, 49
    mask = torch.arange(12) <= torch.tensor([[5], [11], [3]])
    tower = text_tower(path=tmp_path, settings=settings)
    with torch.no_grad():
        hidden, pooled = tower.encode(ids, mask)
        output = theirs.text_model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
        projected = theirs.text_projection(output.pooler_output)
    torch.testing.assert_close(hidden, output.hidden_states[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooled, projected, rtol=1e-4, atol=1e-4)

    tower = image_tower(path=tmp_path, settings=settings)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        output = theirs.vision_model(pixel_values=tower.preprocess(images))
        torch.testing.assert_close(
            tower.encode(images), theirs.visual_projection(output.pooler_output), rtol=1e-4, atol=1e-4
        )


def test_image_tower_prepares_pictures_as_open_clip_does():
    from PIL import Image

    settings = ClipSettings.published("openai/clip-vit-large-patch14")
    with torch.device("meta"):
        tower = ImageTower(settings)
    picture = torch.randint(0, 256, (40, 30, 3), dtype=torch.uint8).repeat_interleave(8, 0).repeat_interleave(8, 1)
    expected = open_clip.image_transform(224, is_train=False)(Image.fromarray(picture.numpy()))
    mine = tower.preprocess(picture.permute(2, 0, 1)[None] / 255)[0]
    assert mine.shape == expected.shape
    assert (mine - expected).abs().mean() < 0.03  # theirs rounds and clips to 8 bits after resizing


def test_default_tokens_are_those_of_the_hugging_face_tokenizer():
    bpe = open_clip.SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    theirs = transformers.CLIPTokenizer(
        vocab={names.get(token, token): i for token, i in bpe.encoder.items()},
        merges=list(bpe.bpe_ranks),
    )
    texts = ["A photo of a Cat, 2024!", "", "word " * 100, "héllo  wörld's 図"]
    with torch.device("meta"):
        tower = TextTower(ClipSettings.published("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"))
    ids, mask = tower.tokenize(texts)
    expected = theirs(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    assert torch.equal(ids, expected.input_ids)
    assert torch.equal(mask, expected.attention_mask.bool())


@pytest.mark.parametrize(
    ("name", "width", "pooled", "quick_gelu"),
    [
        ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", 1280, 1280, False),
        ("ViT-bigG-14", 1280, 1280, False),
        ("openai/clip-vit-large-patch14", 768, 768, True),
        ("ViT-L-14:laion2b_s32b_b82k", 768, 768, False),
    ],
)
def test_public_names_give_the_sizes_of_their_towers(name, width, pooled, quick_gelu):
    settings = ClipSettings.published(name)
    with torch.device("meta"):
        tower = TextTower(settings)
        assert ImageTower(settings).pooled_width == pooled
    assert (tower.width, tower.pooled_width, tower.length, settings.quick_gelu) == (width, pooled, 77, quick_gelu)
    assert (tower.begin_id, tower.end_id, tower.pad_id) == (49406, 49407, 49407)


def test_a_saved_tower_needs_only_its_path(tmp_path):
    texts = ["A red square, left of a blue circle", "a zebra"]
    towers = {"text": TextTower(MINI).eval(), "image": ImageTower(MINI).eval()}
    for kind, tower in towers.items():
        tower.save(tmp_path / f"{kind}.safetensors")
    loaded = text_tower(path=tmp_path / "text.safetensors", dtype=torch.float64)
    ids, mask = loaded.tokenize(texts)
    assert ids[1].tolist()[:4] == [loaded.begin_id, 1, 0, loaded.end_id]  # "zebra" is the unknown word, 0
    assert mask.sum(dim=1).tolist() == [len(split_words(texts[0])) + 2, 4]
    with torch.no_grad():
        for mine, expected in zip(loaded.encode(ids, mask), towers["text"].encode(ids, mask), strict=True):
            torch.testing.assert_close(mine.float(), expected, rtol=0, atol=1e-5)
        images = torch.rand(2, 3, 90, 70)
        mine = image_tower(path=tmp_path / "image.safetensors").encode(images)
        torch.testing.assert_close(mine, towers["image"].encode(images), rtol=0, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_only_the_needed_tower_is_built_and_read(tmp_path, monkeypatch):
    whole = open_clip.CLIP(SMALL.embed_dim, SMALL.vision_cfg, SMALL.text_cfg)
    torch.save(whole.state_dict(), tmp_path / "whole.pt")
    with monkeypatch.context() as patch:
        patch.delattr("open_clip.model.VisionTransformer")
        text = text_tower(path=tmp_path / "whole.pt", settings=SMALL)
    with monkeypatch.context() as patch:
        patch.delattr("open_clip.model.TextTransformer")
        image = image_tower(path=tmp_path / "whole.pt", settings=SMALL)
    ids = torch.cat([torch.randint(0, 48, (2, 11)), torch.full((2, 1), 49)], dim=1)
    with torch.no_grad():
        torch.testing.assert_close(text.encode(ids)[1], whole.eval().encode_text(ids))
        images = torch.rand(2, 3, 32, 32)
        torch.testing.assert_close(image.encode(images), whole.encode_image(image.preprocess(images)))


def test_wrong_weights_and_names_are_refused_clearly(tmp_path):
    file = tmp_path / "text.safetensors"
    TextTower(MINI).save(file)
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.safetensors"):
        text_tower("ViT-bigG-14", path=tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=r"text\.safetensors does not hold the image tower .*missing"):
        image_tower(path=file)
    with pytest.raises(ValueError, match=r"\(64,\) and not \(768,\)|missing"):
        text_tower(path=file, settings=ClipSettings.published("ViT-L-14"))
    with pytest.raises(ValueError, match=r"no CLIP model 'ViT-huge'"):
        text_tower("ViT-huge")
    with pytest.raises(ValueError, match=r"ViT-B-32:\(openai\|"):
        text_tower("ViT-B-32")


def test_pickled_code_in_a_weight_file_is_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    torch.save({"token_embedding.weight": Bomb()}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match=r"holds code beside tensors .*, which is never run"):
        text_tower(path=tmp_path / "bad.pt", settings=SMALL)
    assert not (tmp_path / "ran").exists()


def test_gradients_reach_the_token_embedding():
    tower = TextTower(MINI)
    hidden, pooled = tower.encode(*tower.tokenize(["a red circle"]))
    (hidden.sum() + pooled.sum()).backward()
    assert tower.token_embedding.weight.grad[tower.tokenizer.ids["red"]].abs().sum() > 0
