"""Texts, pictures and files of the reference: what is the same here, and where it differs on purpose."""

import io
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers.transformer_cosmos import CosmosRotaryPosEmbed
from PIL import Image
from transformers import T5Tokenizer

from families.common.pictures import to_pictures
from families.common.t5 import T5TextEncoder, padded
from families.cosmos.components import find_transformer
from families.cosmos.exports import to_published
from families.cosmos.text_to_image import CosmosTextToImage
from families.cosmos.training import TEXT
from tests.families.cosmos.tiny_pipeline import transformer, write_cosmos, write_published
from tests.golden import load_case
from tests.warpcore.runs import tiny_settings
from tools.build_dataset import main as build_dataset
from train.train_cosmos import TrainCosmos
from warpcore.config import make_config
from warpcore.data.images import Geometry, decode, decode_alike


def png(picture: torch.Tensor) -> bytes:
    """A file of (3, H, W) uint8."""
    buffer = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def tokenizer() -> T5Tokenizer:
    """T5's, of the pieces of the recorded words alone, each at its id: the whole vocabulary is not at hand."""
    words = {
        80: "one", 192: "two", 386: "three", 662: "four", 874: "five", 1296: "six", 2391: "seven", 2641: "eight",
        4169: "nine", 1448: "word", 15576: "Physical", 7833: "AI", 4856: "spaces", 11: "and", 689: "line",
    }  # fmt: skip
    pieces = {0: "<pad>", 1: "</s>", 2: "<unk>", 3: "▁", 9: "a"} | {place: f"▁{word}" for place, word in words.items()}
    return T5Tokenizer(vocab=[(pieces.get(place, f"<{place}>"), -2.0) for place in range(32_000)], extra_ids=0)


RECORDED = ("", "  two  spaces\nand a line ", "Physical AI", "one two three four five six seven eight nine")


@pytest.mark.parametrize("prompt", [*RECORDED, "word " * 600])
def test_token_ids_are_cut_and_padded_as_recorded(tokenizer, prompt):
    rules = load_case("cosmos/t5_token_ids")[0]["rules"]
    (rule,) = (one for one in rules if one["prompt"].strip() == prompt.strip())
    encoder = SimpleNamespace(tokenizer=tokenizer, length=rule["max_length"], padding="states", clean=str)
    tokens = T5TextEncoder.tokenize(encoder, [prompt])
    kept, expected = rule["tokens"], rule["ids_without_padding"]
    assert tokens.ids[0, :kept].tolist() == expected
    assert tokens.ids.shape == tokens.mask.shape == (1, rule["padded_to"])
    assert not tokens.ids[0, kept:].any()
    assert tokens.mask.sum() == kept


class Chosen:
    """Random numbers that are given."""

    def __init__(self, numbers: torch.Tensor):
        self.numbers = numbers

    def uniform(self, name: str) -> torch.Tensor:
        return self.numbers


def test_captions_are_dropped_as_recorded(tmp_path):
    _, tensors = load_case("cosmos/conditioner")
    settings = tiny_settings(tmp_path, tmp_path, model_version="mini", caption_dropout=0.2)
    run = TrainCosmos(make_config(TrainCosmos.Config, settings))
    batch = SimpleNamespace(extra={"latents.npy": torch.zeros(6, 16, 2, 2), "text.npy": tensors["in.text"]})
    _, text = run.encode(batch, Chosen(0.1 + 0.8 * tensors["in.keep"]))
    assert torch.equal(text, padded(tensors["out.training"], run.config.version.text_length))


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_guidance_leads_away_from_zeros_or_from_the_negative_prompt(tmp_path, monkeypatch, negative):
    _, tensors = load_case("cosmos/conditioner")
    prompts, seen = [f"prompt {i}" for i in range(6)], {}
    known = dict(zip(prompts, tensors["in.text"], strict=True))
    known |= {"": tensors["out.zeros"][0], "blurry": tensors["in.negative"][0]}
    given = {
        "generator_checkpoint_path": write_cosmos(tmp_path), "size": [32, 32], "prompts": prompts, "device": "cpu",
        "negative_prompt": negative,
    }  # fmt: skip
    task = CosmosTextToImage(make_config(CosmosTextToImage.Config, given))
    monkeypatch.setattr(task.networks, "read", lambda texts: {TEXT: torch.stack([known[text] for text in texts])})
    monkeypatch.setattr(task.networks, "draw", lambda *sides, **_: seen.update(told=sides[0], untold=sides[1]) or [])
    monkeypatch.setattr(task.networks, "decode", lambda *_: [])
    task.draw(prompts, [0] * 6)
    assert torch.equal(seen["told"][TEXT], tensors["in.text"])
    expected = tensors["in.negative"][:1].expand(6, -1, -1) if negative else tensors["out.zeros"]
    assert torch.equal(seen["untold"][TEXT].expand_as(expected), expected)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("number", range(4))
def test_pictures_are_resized_as_recorded_but_never_stretched(number):
    """The reference stretches to the size of training. The same resizing gives its pixels where it is told to stretch;
    a training keeps the shape, and crops."""
    spec, tensors = load_case("cosmos/data_images")
    size, file = tuple(spec["calls"][number]["kwargs"]["image_size"]), png(tensors[f"in.picture_{number}"])
    source, expected = tuple(tensors[f"in.picture_{number}"].shape[1:]), tensors[f"out.picture_{number}"]
    stretched = decode_alike(file, Geometry(source, size, 0, 0, size))
    pixels = torch.from_numpy(stretched.copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1.5 / 127.5)
    (rows, columns), (height, width) = decode(file, size).geometry.resized, source
    assert rows / height == pytest.approx(columns / width, abs=0.6 / min(source))


def test_written_pixels_are_those_of_the_reference_but_bright_pictures_stay_as_they_are():
    """The reference takes a picture without dark pixels for one in [0, 1], and makes it brighter."""
    _, tensors = load_case("cosmos/written_pictures")
    for name in ("signed", "all_bright"):
        values = tensors[f"in.{name}"][:, :, 0]
        found, theirs = to_pictures(values / 2 + 0.5)[0].astype(int), tensors[f"out.{name}"].numpy().astype(int)
        darkest = values.min().item()
        assert (abs(found - theirs).max() <= 1) == (darkest < -0.5)
        if darkest >= -0.5:
            assert abs(found - (theirs / 2 + 127.5))[(theirs > 0) & (theirs < 255)].max() <= 1


# ---------------------------------------------------------------- files


def test_a_folder_of_the_reference_is_packed_whole(tmp_path, capsys):
    """Pictures without features, and of other formats, too; pickles are left out, told of, and never read."""
    spec, _ = load_case("cosmos/data_rules")
    source = tmp_path / "source"
    for folder in ("images", "metas", "t5_xxl"):
        (source / folder).mkdir(parents=True)
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg", "f.png"):
        Image.new("RGB", (32, 16), (0, 0, 200)).save(source / "images" / name)
        (source / "metas" / f"{name[0]}.txt").write_text(f"caption of {name[0]}")
    for name in "abce":
        (source / "t5_xxl" / f"{name}.pickle").write_bytes(b"\x80\x04never read")
    build_dataset([str(source), str(tmp_path / "shards")])
    with tarfile.open(next((tmp_path / "shards").glob("*.tar"))) as tar:
        members = tar.getnames()
        captions = [tar.extractfile(name).read().decode() for name in members if name.endswith(".txt")]
    assert sorted(captions) == [f"caption of {name}" for name in "abcdef"]
    theirs = [rule["file"] for rule in spec["rules"]]
    found = {Path(name).name for name in members if name.endswith((".jpg", ".png"))}
    assert found == {*theirs, "d.jpg", "f.png"}
    told = capsys.readouterr().out
    assert "4" in told
    assert "tools/cache.py" in told
    assert "a pickle, which can run code" in told


def layout() -> dict:
    return load_case("cosmos/checkpoint_layout")[0]["files"]


def test_a_training_run_of_the_reference_is_read(tmp_path):
    """Its tensors are filled with numbers here: those of the weights with 1, those of the average with 2."""
    files = layout()
    run, file = tmp_path / "run", "checkpoints/model/iter_000000500.pt"
    for name in files:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / "checkpoints/latest_checkpoint.txt").write_text(files["checkpoints/latest_checkpoint.txt"]["text"])
    tensors = {
        name: torch.ones(about["shape"], dtype=getattr(torch, about["dtype"])) * (2 if "net_ema." in name else 1)
        for name, about in files[file].items()
    }
    torch.save(tensors, run / file)
    for average, value in ((False, 1), (True, 2)):
        found = find_transformer(run, "generator_checkpoint_path", average=average)
        assert found.config["num_layers"] == 1
        assert (found.config["num_attention_heads"], found.config["attention_head_dim"]) == (2, 32)
        assert all((tensor == value).all() for tensor in found.tensors().values())


def test_an_exported_file_has_the_names_and_types_of_the_reference_s(tmp_path):
    expected = {
        name: (about["dtype"], len(about["shape"]))
        for name, about in layout()["checkpoints/model/iter_000000500.pt"].items()
        if name.startswith("net.")
    }
    source = write_published(tmp_path / "model.pt", transformer())
    to_published(source, tmp_path / "again.pt", ["export_dtype=bfloat16"])
    written = torch.load(tmp_path / "again.pt", weights_only=True)
    first = {
        name: (str(tensor.dtype).removeprefix("torch."), tensor.dim())
        for name, tensor in written.items()
        if ".blocks.1." not in name
    }
    floats = {name for name in expected if "pos_embedder" in name or "accum" in name}
    assert first.keys() == expected.keys()
    assert {name: one for name, one in first.items() if name not in floats} == {
        name: one for name, one in expected.items() if name not in floats
    }


@pytest.mark.parametrize("case", ["1x48x2", "1x1x85"])
def test_rotary_angles_are_more_exact_than_those_of_official_bfloat16_runs(case):
    """By as much as the case says that angles of diffusers, float32 always, differ from them."""
    spec, tensors = load_case("cosmos/rope_bfloat16")
    call = next(call for call in spec["calls"] if call["name"] == case)
    (_, frames, rows, columns, _), stats = call["args"][0], call["result_stats"]
    rope = CosmosRotaryPosEmbed(
        spec["constructor"]["head_dim"], (128, 240, 240), (1, 2, 2), rope_scale=(1.0, 4.0, 4.0)
    )
    cosines, _ = rope(torch.zeros(1, 16, frames, 2 * rows, 2 * columns))
    theirs = tensors[f"out.{case}"].flatten(0, 2).cos()
    assert (cosines - theirs).abs().max().item() == pytest.approx(stats["difference_of_cosines"], rel=0.02)
