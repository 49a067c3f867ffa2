"""Phi gives the states that the reference's encoder gives, and texts are filled up with the network's empty one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from families.common.text_conditions import Tokens
from families.nova.text import PhiTextEncoder
from modules.nova_embeddings import TextEmbedding
from tests.golden import load_case, resolve, weights_of
from warpcore.errors import UserError

SPEC, TENSORS = load_case("nova/phi_small")
KEY = "text_encoder_checkpoint_path"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A pipeline's folder, whose tokenizer reads token ids with blanks between them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("pipeline")
    for part in ("text_encoder", "tokenizer"):
        (folder / part).mkdir()
    numbers = SPEC["constructor"] | {"model_type": "phi", "architectures": ["PhiForCausalLM"]}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(numbers), encoding="utf-8")
    save_file(weights_of(SPEC, TENSORS), folder / "text_encoder" / "model.safetensors")
    tokenizer = Tokenizer(models.WordLevel({str(number): number for number in range(61)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


def test_states_are_those_of_the_reference(folder):
    encoder = PhiTextEncoder.load(folder)
    assert encoder.width == 40
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    for call in SPEC["calls"]:
        (ids,) = resolve(call["args"], TENSORS)
        found = encoder.encode(Tokens(ids, torch.ones_like(ids, dtype=torch.bool))).hidden
        expected, atol = resolve(call["result"], TENSORS), call["result_stats"]["suggested_atol"]
        torch.testing.assert_close(found, expected.view_as(found), rtol=0, atol=atol)


def test_prompts_are_filled_up_as_in_the_reference(folder):
    spec, tensors = load_case("nova/encode_prompt")
    length = spec["constructor"]["num_tokens"]
    encoder, network = PhiTextEncoder.load(folder, length=length), TextEmbedding(40, 8, length)
    empty = resolve(spec["null_rows"], tensors)
    network.weight[: len(empty)] = empty

    def rows(texts: list[str]) -> Tensor:
        made = encoder(texts)
        return network.filled(made.hidden, made.lengths)

    seen = 0
    for call in spec["calls"]:
        given = call["kwargs"]
        if "prompt" not in given:
            continue
        repeats = given.get("num_images_per_prompt", 1)
        prompts = [given["prompt"]] if isinstance(given["prompt"], str) else given["prompt"]
        negative = given.get("negative_prompt", "")
        negative = [negative] * len(prompts) if isinstance(negative, str) else negative
        found = rows(prompts).repeat_interleave(repeats, dim=0)
        if call["guidance_scale"] > 1:
            found = torch.cat([found, rows(negative).repeat_interleave(repeats, dim=0)])
        expected, atol = resolve(call["result"], tensors), call["result_stats"]["suggested_atol"]
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)
        seen += 1
    assert seen == 5


def test_texts_are_cut_and_the_empty_one_has_no_tokens(folder):
    encoder = PhiTextEncoder.load(folder, length=3)
    tokens = encoder.tokenize(["1 2 3 4", "5", ""])
    assert tokens.ids.tolist() == [[1, 2, 3], [5, 0, 0], [0, 0, 0]]
    assert tokens.mask.sum(dim=1).tolist() == [3, 1, 0]
    assert encoder.are_cut(["1 2 3 4", "5"]) == [True, False]
    assert encoder(["", ""]).lengths.tolist() == [0, 0]
    both, alone = encoder(["1 2 3", "5"]), encoder(["5"])
    torch.testing.assert_close(both.hidden[1:, :1], alone.hidden, rtol=0, atol=1e-5)
    assert not both.hidden[1, 1:].any()


def test_positions_stay_in_float32(folder):
    encoder, half = PhiTextEncoder.load(folder), PhiTextEncoder.load(folder, precision="bfloat16")
    assert half.model.layers[0].mlp.fc1.weight.dtype == torch.bfloat16
    assert torch.equal(half.model.rotary_emb.inv_freq, encoder.model.rotary_emb.inv_freq)
    torch.testing.assert_close(half(["3 17 44"]).hidden.float(), encoder(["3 17 44"]).hidden, rtol=0, atol=0.1)


def test_what_is_no_phi_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match="is that of 't5', not of phi"):
        PhiTextEncoder({"model_type": "t5"}, tmp_path, key=KEY)
    with pytest.raises(UserError, match=r"holds no tokenizer of Phi \(tokenizer.json\)"):
        PhiTextEncoder(SPEC["constructor"], tmp_path, key=KEY)
    with pytest.raises(UserError, match=r"has no config.json"):
        PhiTextEncoder.load(tmp_path, key=KEY)
    numbers = SPEC["constructor"] | {"vocab_size": 60}
    with pytest.raises(UserError, match="the tokenizer has 61 tokens, the encoder 60"):
        PhiTextEncoder(numbers, folder / "tokenizer", key=KEY)
