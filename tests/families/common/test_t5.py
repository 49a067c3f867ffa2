"""T5 encoders against transformers and golden numbers, on tiny random networks."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import T5EncoderModel, T5Tokenizer

from families.common.captions import cut_note
from families.common.features import lengths_name, stack_rows, take_row
from families.common.t5 import T5TextEncoder, padded, token_mask
from families.common.text_conditions import Tokens
from families.common.weight_source import wanted
from tests.fake_gpu import GPU, FakeGpu
from tests.families.common.tiny_t5 import PIECES, write_t5, write_tokenizer
from tests.golden import load_case, resolve, weights_of
from warpcore.errors import UserError
from warpcore.meta import only_shapes

TEXTS = ["a red star", "", "word " * 40]
LENGTH = 20
LOST_CODE = "__import__('os').system('true')"


@pytest.fixture
def folder(tmp_path):
    write_t5(tmp_path / "t5")
    write_tokenizer(tmp_path / "t5")
    return tmp_path / "t5"


@torch.no_grad()
def by_transformers(folder, texts, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    """The last hidden states (B, L, D) of padded texts, and their mask."""
    model, tokenizer = T5EncoderModel.from_pretrained(folder), T5Tokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return model(tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state, tokens.attention_mask


@pytest.mark.parametrize("gated", [False, True])
def test_states_are_those_of_transformers_with_zeros_after_each_text(tmp_path, gated):
    write_t5(tmp_path, gated=gated)
    write_tokenizer(tmp_path)
    encoder = T5TextEncoder.load(tmp_path, length=LENGTH)
    conditions = encoder(TEXTS)
    expected, mask = by_transformers(tmp_path, TEXTS)
    torch.testing.assert_close(padded(conditions.hidden, LENGTH), expected * mask[..., None])
    assert conditions.lengths.tolist() == [9, 1, LENGTH]
    assert torch.equal(token_mask(conditions.lengths, LENGTH), mask.bool())
    assert conditions.pooled is None
    assert encoder.width == 16


def test_short_texts_are_padded_to_the_longest_of_them_and_states_of_padding_are_an_option(folder):
    short, whole = (T5TextEncoder.load(folder, length=LENGTH, padding=padding) for padding in ("zeros", "states"))
    assert short(TEXTS[:2]).hidden.shape == (2, 9, 16)
    expected, mask = by_transformers(folder, TEXTS[:2])
    conditions = whole(TEXTS[:2])
    torch.testing.assert_close(conditions.hidden, expected)
    assert torch.equal(conditions.mask, mask.bool())


def test_cut_texts_end_with_the_end_token(folder):
    encoder = T5TextEncoder.load(folder, length=LENGTH)
    exact, longer = "abcdefghijklmnopqrs", "abcdefghijklmnopqrst"
    tokens = encoder.tokenize([exact, longer, "b,"])
    ids = {piece: i for i, (piece, _) in enumerate(PIECES)}
    assert tokens.ids[0].tolist() == [ids["▁a"], *(ids[letter] for letter in exact[1:]), ids["</s>"]]
    assert tokens.ids[1].tolist() == tokens.ids[0].tolist()
    assert tokens.ids[2].tolist() == [ids["▁b"], ids[","], ids["</s>"], *[ids["<pad>"]] * 17]
    assert encoder.are_cut([exact, longer, ""]) == [False, True, False]
    assert cut_note(encoder, [exact, longer], "captions") == [
        "1 of 2 captions are longer than the 20 tokens that the text encoder reads; the rest of each is cut off, as "
        f"of '{longer}...'"
    ]


def test_the_empty_text_can_be_zeros(folder):
    plain, zeros = (T5TextEncoder.load(folder, length=LENGTH, zeros_for_empty=own) for own in (False, True))
    assert plain([""]).hidden.abs().max() > 0.1
    conditions = zeros(TEXTS)
    assert not padded(conditions.hidden, LENGTH)[1].any()
    torch.testing.assert_close(conditions.hidden[[0, 2]], plain(TEXTS).hidden[[0, 2]], rtol=0, atol=0)
    assert conditions.lengths.tolist() == [9, 1, LENGTH]


def test_cosmos_golden_states():
    case, tensors = load_case("cosmos/text_encoder")
    call = case["calls"][0]
    given, (hidden, _) = resolve(call["kwargs"], tensors), resolve(call["result"]["tuple"], tensors)
    tokens = Tokens(given["input_ids"].long(), given["attention_mask"].bool())
    encoder = T5TextEncoder.of(
        case["constructor"], T5Tokenizer(vocab=PIECES, extra_ids=0), lambda _: weights_of(case, tensors), "golden"
    )
    conditions = encoder.encode(tokens)
    torch.testing.assert_close(conditions.hidden, hidden, rtol=0, atol=call["result_stats"]["suggested_atol"])
    made = {"text": conditions.hidden, lengths_name("text"): conditions.lengths}
    rows = [take_row(made, place) for place in range(len(hidden))]
    trimmed = resolve(case["calls"][1]["result"], tensors)
    assert rows[0]["text"].half().shape == trimmed.shape
    torch.testing.assert_close(rows[0]["text"].half().float(), trimmed.float(), rtol=0, atol=2e-3)
    assert torch.equal(padded(stack_rows(rows)["text"], hidden.shape[1]), conditions.hidden)


def test_whatever_is_a_t5_is_read(tmp_path):
    """One file or several, safetensors or pickled, with a decoder, either name of the embedding, in a pipeline."""
    write_t5(tmp_path / "whole", whole=True)
    tokenizer = write_tokenizer(tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    assert any(name.startswith("decoder.") for name in tensors)
    expected = T5TextEncoder.load(tmp_path / "whole", length=LENGTH)(TEXTS).hidden
    states, mask = by_transformers(tmp_path / "whole", TEXTS)
    torch.testing.assert_close(expected, states * mask[..., None])
    model = T5EncoderModel.from_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "several", max_shard_size=20_000)
    model.save_pretrained(tmp_path / "pipeline" / "text_encoder_3")
    tokenizer.save_pretrained(tmp_path / "pipeline" / "tokenizer_3")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1
    config = (tmp_path / "several" / "config.json").read_text()
    encoder_only = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
    embedding = encoder_only.pop("shared.weight")
    halves = [dict(list(encoder_only.items())[part::2]) for part in (0, 1)]
    for name, files in {
        "bin": {"pytorch_model.bin": tensors},
        "old bin": {"pytorch_model.bin": tensors},
        "alias": {"pytorch_model.bin": encoder_only | {"encoder.embed_tokens.weight": embedding}},
        "bins": {
            "pytorch_model-00001-of-00002.bin": halves[0] | {"shared.weight": embedding},
            "pytorch_model-00002-of-00002.bin": halves[1],
        },
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        for file, content in files.items():
            torch.save(content, tmp_path / name / file, _use_new_zipfile_serialization=not name.startswith("old"))
        if len(files) > 1:
            index = {"weight_map": {key: file for file, content in files.items() for key in content}}
            (tmp_path / name / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name in ("several", "bin", "old bin", "alias", "bins"):
        tokenizer.save_pretrained(tmp_path / name)
        found = T5TextEncoder.load(tmp_path / name, length=LENGTH)(TEXTS).hidden
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    of_pipeline = T5TextEncoder.load(tmp_path / "pipeline", subfolder="text_encoder_3", length=LENGTH)
    torch.testing.assert_close(of_pipeline(TEXTS).hidden, expected, rtol=0, atol=0)


def test_pickled_weights_are_downloaded_where_there_are_no_others():
    files = {"config.json": 1, "spiece.model": 1, "pytorch_model.bin": 9, "tf_model.h5": 9}
    assert set(wanted(files, "", "owner/t5")) == {"config.json", "spiece.model", "pytorch_model.bin"}
    assert set(wanted(files | {"model.safetensors": 9}, "", "owner/t5")) == {
        "config.json", "spiece.model", "model.safetensors",
    }  # fmt: skip
    parts = {f"pytorch_model-0000{part}-of-00002.bin": 9 for part in (1, 2)}
    assert parts.keys() <= set(wanted(parts | {"config.json": 1}, "", "owner/t5"))


def test_an_encoder_keeps_its_precision(folder):
    plain, low = T5TextEncoder.load(folder), T5TextEncoder.load(folder, precision="bfloat16")
    expected = plain(TEXTS).hidden
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(plain.to(torch.bfloat16)(TEXTS).hidden, expected, rtol=0, atol=0)
    assert low(TEXTS).hidden.dtype == torch.bfloat16
    assert 1e-4 < (low(TEXTS).hidden.float() - expected).norm() / expected.norm() < 0.05
    assert low.model.shared is low.model.encoder.embed_tokens
    assert not any(parameter.requires_grad for parameter in low.parameters())
    with pytest.raises(UserError, match="te: T5 overflows in float16; write bfloat16"):
        T5TextEncoder.load(folder, precision="float16", key="te")


def test_four_bits_are_near_the_original(tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="an optional package")
    write_t5(tmp_path, width=128)
    write_tokenizer(tmp_path)
    exact, small = T5TextEncoder.load(tmp_path), T5TextEncoder.load(tmp_path, precision="nf4")
    weight = small.model.encoder.block[0].layer[1].DenseReluDense.wi.weight
    assert isinstance(weight.data, torchao.NF4Tensor)
    expected, found = exact(TEXTS).hidden, small(TEXTS).hidden
    assert found.dtype == torch.bfloat16
    assert 1e-3 < (found.float() - expected).norm() / expected.norm() < 0.35


def test_on_a_gpu_nothing_is_waited_for(folder):
    encoder = T5TextEncoder.load(folder, zeros_for_empty=True)
    with FakeGpu() as gpu:
        encoder.to(GPU)
        tokens = encoder.tokenize(TEXTS[:2])
        encoder.encode(tokens)
        with gpu.watched():
            conditions = encoder.encode(tokens)
            padded(conditions.hidden, LENGTH), token_mask(conditions.lengths, LENGTH)
        assert conditions.hidden.device == GPU


def test_only_shapes_reads_no_weights(folder):
    (folder / "model.safetensors").unlink()
    with only_shapes():
        network = T5TextEncoder.load(folder)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


class Code:
    def __reduce__(self):
        return eval, (LOST_CODE,)


def test_what_does_not_fit_is_one_clear_error(folder, tmp_path):
    def with_config(name: str, **changes) -> None:
        given = json.loads((folder / "config.json").read_text())
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(given | changes))
        write_tokenizer(tmp_path / name)

    with_config("umt5", model_type="umt5")
    with_config("small", vocab_size=8)
    with_config("wrong", d_kv="eight")
    with_config("code")
    with_config("list")
    with_config("none")
    torch.save({"shared.weight": Code()}, tmp_path / "code" / "pytorch_model.bin")
    torch.save([torch.zeros(2)], tmp_path / "list" / "pytorch_model.bin")
    (tmp_path / "no tokenizer").mkdir()
    (tmp_path / "no tokenizer" / "config.json").write_text((folder / "config.json").read_text())
    for name, message in {
        "umt5": "te: its config is that of 'umt5', not of t5",
        "small": "te: the tokenizer has 58 tokens, the encoder 8",
        "wrong": "te: its config is none of T5Config",
        "code": "te: .*pytorch_model.bin cannot be read as weights",
        "list": "holds a list instead of tensors by name",
        "none": "te: .* holds no weights",
        "no tokenizer": "holds no tokenizer of T5",
        "missing": "te: .* does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            T5TextEncoder.load(tmp_path / name, key="te")
    (tmp_path / "no tokenizer" / "spiece.model").write_bytes(b"no pieces")
    with pytest.raises(UserError, match=r"tokenizer|pip install sentencepiece"):
        T5TextEncoder.load(tmp_path / "no tokenizer")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"text_encoder: the tokenizer in .* cannot be read"):
        T5TextEncoder.load(folder)
