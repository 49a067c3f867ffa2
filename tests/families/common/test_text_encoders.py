"""CLIP text encoders against diffusers' pipelines and transformers, on tiny random networks."""

from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from families.common.text_encoders import LAST, PENULTIMATE, ClipTextEncoder, ClipTextEncoders, HiddenState
from modules.clip import text_tower
from tests.families.common.tiny_clip import write_encoder, write_tokenizer, write_two_encoders
from warpcore.errors import UserError
from warpcore.meta import only_shapes

TEXTS = ["a red star", "", "word " * 40]

T5 = Path(__file__).parents[3] / "models/mini/t5.safetensors"


@pytest.fixture
def folder(tmp_path):
    write_two_encoders(tmp_path)
    return tmp_path


def pipeline_sd(folder) -> diffusers.StableDiffusionPipeline:
    return diffusers.StableDiffusionPipeline(
        vae=None, unet=None, scheduler=None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
    )  # fmt: skip


def pipeline_sdxl(folder, zeros: bool) -> diffusers.StableDiffusionXLPipeline:
    return diffusers.StableDiffusionXLPipeline(
        vae=None, unet=None, scheduler=None, force_zeros_for_empty_prompt=zeros, add_watermarker=False,
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        tokenizer_2=CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
    )  # fmt: skip


def both(folder, **options) -> ClipTextEncoders:
    encoders = [ClipTextEncoder.load(folder, hidden=PENULTIMATE, number=number) for number in (1, 2)]
    return ClipTextEncoders(encoders, **options)


@pytest.mark.parametrize("skip", [0, 1])
def test_one_encoder_gives_the_condition_of_stable_diffusion(folder, skip):
    encoder = ClipTextEncoder.load(folder, hidden=HiddenState(skip) if skip else LAST)
    pipeline = pipeline_sd(folder)
    if skip:  # diffusers takes `text_model` here, which transformers 5 has no longer
        norm = pipeline.text_encoder.final_layer_norm
        pipeline.text_encoder.text_model = SimpleNamespace(final_layer_norm=norm)
    conditions = encoder(TEXTS)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(TEXTS, "cpu", 1, False, clip_skip=skip or None)
    torch.testing.assert_close(conditions.hidden, expected)
    assert conditions.hidden.shape == (3, 77, 16)
    assert conditions.pooled is None
    assert conditions.lengths.tolist() == [10, 2, 77]
    assert conditions.mask.sum(dim=1).tolist() == [10, 2, 77]


@pytest.mark.parametrize("zeros", [False, True])
def test_two_encoders_give_the_conditions_of_sdxl(folder, zeros):
    encoders, pipeline = both(folder, zeros_for_empty=zeros), pipeline_sdxl(folder, zeros)
    conditions = encoders([TEXTS[0], TEXTS[2], ""])
    with torch.no_grad():
        negative = None if zeros else ""
        hidden, empty, pooled, empty_pooled = pipeline.encode_prompt(
            TEXTS[::2], device="cpu", negative_prompt=negative and [negative] * 2
        )
    torch.testing.assert_close(conditions.hidden, torch.cat([hidden, empty[:1]]))
    torch.testing.assert_close(conditions.pooled, torch.cat([pooled, empty_pooled[:1]]))
    assert conditions.hidden.shape == (3, 77, 16 + 24)
    assert conditions.pooled.shape == (3, 20)
    assert conditions.lengths.tolist() == [10, 77, 2]
    assert bool(conditions.hidden[2].any()) != zeros


def test_an_encoder_keeps_its_precision_under_autocast(folder):
    plain, moved = both(folder), both(folder).to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        conditions = moved(TEXTS)
    torch.testing.assert_close(conditions.hidden, plain(TEXTS).hidden, rtol=0, atol=0)
    low = ClipTextEncoder.load(folder, precision="bfloat16")
    assert low(TEXTS).hidden.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in low.parameters())
    torch.testing.assert_close(
        low(TEXTS).hidden.float(), ClipTextEncoder.load(folder)(TEXTS).hidden, rtol=0.1, atol=0.2
    )


def test_four_bits_are_near_the_original(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="an optional package")
    write_encoder(tmp_path / "text_encoder", write_tokenizer(tmp_path / "tokenizer"), seed=3, width=128, heads=4)
    exact, small = ClipTextEncoder.load(tmp_path), ClipTextEncoder.load(tmp_path, precision="nf4")
    weight = small.to(torch.bfloat16).model.encoder.layers[0].self_attn.q_proj.weight
    assert isinstance(weight.data, torchao.NF4Tensor)
    assert weight.quantized_data.nbytes == weight.numel() // 2
    expected, output = exact(TEXTS).hidden, small(TEXTS).hidden
    assert output.dtype == torch.bfloat16
    assert 1e-3 < (output.float() - expected).norm() / expected.norm() < 0.35


def test_published_files_have_a_prefix_and_position_ids(folder):
    file = folder / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in load_file(file).items()}
    expected = ClipTextEncoder.load(folder)(TEXTS).hidden
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, file)
    torch.testing.assert_close(ClipTextEncoder.load(folder)(TEXTS).hidden, expected, rtol=0, atol=0)


def test_texts_that_are_cut_are_logged_once(folder, caplog):
    encoder = ClipTextEncoder.load(folder)
    encoder(TEXTS)
    encoder(TEXTS)
    assert [record.getMessage() for record in caplog.records if "cut" in record.getMessage()] == [
        "text_encoder: 1 of 3 texts are cut to 77 tokens"
    ]


def test_what_does_not_fit_is_one_clear_error(folder, tmp_path):
    larger = write_tokenizer(tmp_path / "larger")
    larger.add_tokens(["<new>"])
    larger.save_pretrained(tmp_path / "larger")
    (tmp_path / "empty").mkdir()
    second = folder / "text_encoder_2"
    for error, load in (
        ("te_path: .* does not exist", lambda: ClipTextEncoder.load(tmp_path / "none", key="te_path")),
        ("has no config.json", lambda: ClipTextEncoder.load(tmp_path / "empty")),
        ("a text encoder of the type t5; here one of CLIP is read", lambda: ClipTextEncoder.load(T5)),
        ("holds no tokenizer", lambda: ClipTextEncoder.load(folder, tmp_path / "empty")),
        ("has 57 tokens, the encoder 56", lambda: ClipTextEncoder.load(folder, tmp_path / "larger")),
        (
            "clip_skip 4 of 3 layers; write a number from 1 to 3",
            lambda: ClipTextEncoder.load(folder, hidden=HiddenState(3)),
        ),
    ):
        with pytest.raises(UserError, match=error):
            load()
    tensors = load_file(second / "model.safetensors")
    save_file(
        {name: t for name, t in tensors.items() if name != "text_projection.weight"}, second / "model.safetensors"
    )
    with pytest.raises(UserError, match=r"another network: text_projection\.weight is missing in the file"):
        ClipTextEncoder.load(folder, number=2)


def test_only_shapes_reads_no_weights(folder):
    (folder / "text_encoder" / "model.safetensors").unlink()
    with only_shapes():
        network = ClipTextEncoder.load(folder)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


@torch.no_grad()
def test_our_own_text_tower_is_read_as_a_text_encoder_and_gives_the_same_states():
    file = Path(__file__).parents[3] / "models" / "mini" / "text_tower.safetensors"
    captions = ["a red star on the left", "", "two striped hoops: seen near the lower edge, in front of wombats"]
    tower, encoder = text_tower(path=file, dtype=torch.float32), ClipTextEncoder.load(file)
    ids, mask = tower.tokenize(captions)
    tokens = encoder.tokenize(captions)
    assert torch.equal(tokens.ids, ids)
    assert torch.equal(tokens.mask, mask)
    hidden, pooled = tower.encode(ids)
    conditions = encoder(captions)
    torch.testing.assert_close(conditions.hidden, tower.model.ln_final(hidden))
    torch.testing.assert_close(conditions.pooled, pooled)
    unnormed = ClipTextEncoder.load(file, hidden=HiddenState(final_norm=False))(captions).hidden
    torch.testing.assert_close(unnormed, hidden)
    masked, _ = tower.encode(ids, mask)  # later tokens are never seen: only the padding itself is another
    torch.testing.assert_close(unnormed[mask], masked[mask])
    with only_shapes():
        assert ClipTextEncoder.load(file).device.type == "meta"


def in_chunks_of_kohya(folder, number: int, text: str, chunks: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states (75 N + 2, D) and pooled vector (P), as sd-scripts make them for max_token_length 75 N."""
    suffix = "" if number == 1 else "_2"
    tokenizer = CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}")
    kind = CLIPTextModel if number == 1 else CLIPTextModelWithProjection
    model = kind.from_pretrained(folder / f"text_encoder{suffix}")
    length, end, pad = 75 * chunks + 2, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = tokenizer(text, padding="max_length", truncation=True, max_length=length).input_ids
    rows = []
    for start in range(1, length - 75, 75):
        row = [ids[0], *ids[start : start + 75], ids[-1]]
        if pad != end:
            if row[-2] not in (end, pad):
                row[-1] = end
            if row[1] == pad:
                row[1] = end
        rows.append(row)
    with torch.no_grad():
        output = model(torch.tensor(rows), output_hidden_states=True)
    hidden = output.hidden_states[-2]
    joined = [hidden[0, :1], *(of_chunk[1:-1] for of_chunk in hidden), hidden[-1, -1:]]
    return torch.cat(joined), None if number == 1 else output.text_embeds[0]


@pytest.mark.parametrize("letters", [0, 3, 74, 75, 76, 149, 150, 151, 400])
def test_long_texts_are_read_in_chunks_as_by_other_trainers(folder, letters):
    text = ("abcdefg" * 60)[:letters]
    conditions = both(folder, chunks=2)([text])
    (first, _), (second, pooled) = (in_chunks_of_kohya(folder, number, text, 2) for number in (1, 2))
    torch.testing.assert_close(conditions.hidden[0], torch.cat([first, second], dim=-1))
    torch.testing.assert_close(conditions.pooled[0], pooled)
    assert conditions.hidden.shape == (1, 152, 16 + 24)
    assert conditions.lengths.tolist() == [min(letters, 150) + 2]
    if letters > 75:  # what one chunk cuts off counts here
        assert not torch.equal(both(folder, chunks=2)([text[:75]]).hidden, conditions.hidden)
