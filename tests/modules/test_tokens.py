"""Trained tokens against golden numbers, and that only their rows learn."""

import pytest
import torch
from torch import nn

from modules.clip import ClipSettings, TextTower
from modules.tokenizers import BytePairTokenizer, WordTokenizer
from modules.tokens import ExtendedEmbedding, Token, TokenRows, attach, find_tokens, untrained
from tests.golden import load_case
from tests.modules.test_clip import golden_tower

WORDS = ["a", "big", "dog", "dogs", "of", "picture", "snail"]
BYTE_PAIRS = BytePairTokenizer()


def word_tower() -> TextTower:
    torch.manual_seed(0)
    settings = ClipSettings(
        embed_dim=24, text_cfg={"width": 16, "heads": 2, "layers": 2, "context_length": 8}, words=WORDS
    )
    return TextTower(settings).eval().requires_grad_(False)


def test_rows_change_the_golden_table():
    _, tensors = load_case("lora_layers")
    table, indices = tensors["in.retoken.embedding_table"], tensors["in.retoken.indices"]
    assert table.shape == (20, 64), "the first columns of 1280"
    rows = TokenRows([Token(f"t{i}", i, (i,)) for i in indices.tolist()], table[indices])
    rows.delta.data.copy_(tensors["in.retoken.embeddings"])
    embedding = ExtendedEmbedding(nn.Embedding.from_pretrained(table), len(table), rows)
    torch.testing.assert_close(embedding(torch.arange(20)[None])[0], tensors["out.retoken.effective_table"])


def test_a_further_token_gives_the_golden_conditions_pooled_at_the_end_token():
    tower, spec, tensors = golden_tower("clip_text_gelu")
    tower.tokenizer.vocab_size = 80
    attach(tower, TokenRows([Token("[new]", 80, ())], tensors["in.added_token_row"]))
    call = next(call for call in spec["calls"] if call["name"] == "added_token_end_pooling")
    with torch.no_grad():
        hidden, pooled = tower.encode(tensors[call["input_ids"]], tensors[call["attention_mask"]])
    tolerance = {"rtol": 0, "atol": call["result_stats"]["suggested_atol"]}
    outputs = call["outputs"]
    torch.testing.assert_close(hidden, tensors[outputs["clip_text (hidden_states[-1])"]], **tolerance)
    torch.testing.assert_close(pooled, tensors[outputs["clip_text_pooled (text_embeds)"]], **tolerance)


def test_new_tokens_start_as_the_mean_of_what_the_expression_finds():
    tower = word_tower()
    tokens = find_tokens(tower.tokenizer, [("[fernando]", "^dogs?</w>"), ("^snail", None), ("<empty>", None)])
    assert [token.name for token in tokens] == ["[fernando]", "snail</w>", "<empty>"]
    rows, table = TokenRows.of(tower, tokens), tower.token_embedding.weight
    torch.testing.assert_close(rows.initial, torch.stack([(table[3] + table[4]) / 2, table[7], table[0] * 0]))


def test_byte_pairs_keep_a_new_token_whole_anywhere():
    (token,) = find_tokens(BYTE_PAIRS, [("[fernando]", "^dog</w>")])
    assert token.sources == (BYTE_PAIRS.encode("dog")[0],)
    tower = TextTower(ClipSettings(embed_dim=8, text_cfg={"width": 8, "heads": 2, "layers": 1, "context_length": 12}))
    attach(tower, TokenRows.of(tower, [token]))
    ids, _ = tower.tokenize(["A photo of [Fernando], running", "x[fernando]y", "a dog"])
    plain = [BYTE_PAIRS.encode(text) for text in ("a photo of", ", running", "x", "y", "a dog")]
    assert ids[0].tolist()[1:8] == [*plain[0], 49408, *plain[1], 49407]
    assert ids[1].tolist()[1:5] == [*plain[2], 49408, *plain[3], 49407]
    assert ids[2].tolist()[1:4] == [*plain[4], 49407]


def test_the_public_example_trains_snails_and_one_new_token():
    tokens = find_tokens(BYTE_PAIRS, [("^snail", None), ("[fernando]", "^dog</w>")])
    assert {token.name for token in tokens} == {"snail</w>", "snails</w>", "[fernando]"}
    assert {BYTE_PAIRS.encode(word)[0] for word in ("snail", "snails")} == {token.id for token in tokens[:2]}
    assert tokens[2].id == BYTE_PAIRS.vocab_size == 49408


def test_only_the_rows_learn_and_other_texts_stay_as_they_are():
    tower, plain = word_tower(), word_tower()
    rows = TokenRows.of(tower, find_tokens(tower.tokenizer, [("[fernando]", "^dog</w>"), ("snail", None)]))
    attach(tower, rows)
    assert [name for name, _ in tower.named_parameters() if "delta" in name] == []
    texts = ["a picture of [fernando]", "a big dog"]
    tower.encode(*tower.tokenize(texts))[1].square().sum().backward()
    assert rows.delta.grad[0].abs().sum() > 0
    assert not rows.delta.grad[1].any()  # no snail in the texts
    assert all(p.grad is None for p in tower.parameters())
    with torch.no_grad():
        rows.delta += 1.0
        new, dog = tower.encode(*tower.tokenize(texts))[0]
        (before,), _ = plain.encode(*plain.tokenize(["a big dog"]))
        torch.testing.assert_close(dog, before)  # in a batch of another size, sums round otherwise
        with untrained(rows):
            start = tower.encode(*tower.tokenize(texts))[0][0]
        torch.testing.assert_close(start, plain.encode(*plain.tokenize(["a picture of dog"]))[0][0])
        assert not torch.allclose(new, start)


def test_tokens_of_two_files_live_side_by_side():
    tower = word_tower()
    for name in ("[one]", "[two]"):
        rows = TokenRows.of(tower, find_tokens(tower.tokenizer, [(name, "dog")]))
        rows.delta.data += len(tower.tokenizer.vocabulary)
        attach(tower, rows)
    ids, _ = tower.tokenize(["[two] dogs of [one]", "[one]"])
    embedded = tower.token_embedding(ids)
    table = word_tower().token_embedding.weight
    start = (table[3] + table[4]) / 2
    torch.testing.assert_close(embedded[0, 1], start + 8)
    torch.testing.assert_close(embedded[0, 4], start + 7)
    torch.testing.assert_close(embedded[1, 1], start + 7)
    assert torch.equal(embedded[0, 2], table[4])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (("fernando", None), r"'fernando' finds no token of the vocabulary.*in brackets"),
        (("snial", None), r"near ones: snail</w>"),
        (("[fernando]", "^cat</w>"), r"'\^cat</w>' finds no token"),
        (("[my dog]", "dog"), r"cannot stay whole"),
        (("[]", None), r"cannot stay whole"),
        (("^snail", "dog"), r"only a new token starts from others"),
        (("(", None), r"no regular expression"),
        (("", None), r"finds no token"),
    ],
)
def test_tokens_that_cannot_be_are_refused(entry, said):
    with pytest.raises(ValueError, match=said):
        find_tokens(WordTokenizer(WORDS), [entry])


@pytest.mark.parametrize("again", ["[dog]", "[Dog]"])
def test_a_token_is_not_made_twice(again):
    with pytest.raises(ValueError, match="there already, in upper or lower case"):
        find_tokens(WordTokenizer(WORDS), [("[dog]", None), (again, None)])
