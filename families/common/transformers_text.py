"""Text towers as transformers keeps them, a CLIPTextModelWithProjection and its tokenizer, and back."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
)

from families.common.library_files import built, check_layers
from modules.clip import ClipSettings, TextTower
from modules.clip_weights import convert_hugging_face
from modules.tokenizers import UNKNOWN_WORD, BytePairTokenizer
from warpcore.errors import UserError
from warpcore.safe_json import read_object
from warpcore.text import shortened

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
PROBES = ["", "A red circle, on the left: 3 × 'stars'!", "word " * 200]
"""Texts whose ids are compared before a tokenizer is trusted."""


def text_encoder(tower: TextTower) -> CLIPTextModelWithProjection:
    """The tower as transformers' network, every bit of its weights kept."""
    own, config = tower.model.state_dict(), tower.settings.text_cfg
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(own["token_embedding.weight"]),
            hidden_size=tower.width,
            intermediate_size=len(own["transformer.resblocks.0.mlp.c_fc.weight"]),
            projection_dim=tower.pooled_width,
            num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"],
            max_position_embeddings=tower.length,
            hidden_act="quick_gelu" if tower.settings.quick_gelu else "gelu",
            bos_token_id=tower.begin_id,
            eos_token_id=tower.end_id,
            pad_token_id=tower.pad_id,
        )
    )
    model.load_state_dict(_hugging_face(own, model.state_dict()), strict=True, assign=True)
    return model.eval()


def _hugging_face(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's weights under the names of transformers: `convert_hugging_face` backwards, name by name."""
    found = {}
    for name, like in theirs.items():
        projection = re.search(r"\.([qkv])_proj\.", name)
        if projection is None:
            ((ours, converted),) = convert_hugging_face({name: like}).items()
            found[name] = own[ours] if converted is like else own[ours].T.contiguous()
        else:
            (ours,) = convert_hugging_face({name.replace(projection[0], ".q_proj."): like})
            found[name] = own[ours].chunk(3)["qkv".index(projection[1])]
    return found


def tokenizer(tower: TextTower) -> PreTrainedTokenizerFast:
    """A tokenizer of transformers that gives the tower's ids, begin, end and padding included.

    A list of words differs in one thing: a text that spells `<|startoftext|>` or `<|endoftext|>` gets those tokens.

    Raises:
        UserError: it would give other ids, as settings of the tower (begin_id, end_id, pad_id) are unusual.
    """
    made = byte_pair_tokenizer(tower.length) if tower.settings.words is None else _word_tokenizer(tower)
    theirs = made(PROBES, padding="max_length", max_length=tower.length, truncation=True, return_tensors="pt")
    ids, mask = tower.tokenize(PROBES)
    if not torch.equal(theirs.input_ids, ids) or not torch.equal(theirs.attention_mask.bool(), mask):
        raise UserError(
            "the text tower's tokenizer cannot be written for transformers: its begin, end or pad id is unusual"
        )
    return made


def byte_pair_tokenizer(length: int, pad_token: str = END) -> CLIPTokenizer:
    """That of the public CLIP models, for texts of `length` tokens."""
    pairs = BytePairTokenizer()
    vocabulary = pairs.vocabulary | {BEGIN: pairs.begin_id, END: pairs.end_id}
    merges = list(open_clip.SimpleTokenizer().bpe_ranks)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token, model_max_length=length)


def _word_tokenizer(tower: TextTower) -> PreTrainedTokenizerFast:
    words = tower.tokenizer
    rules = Tokenizer(models.WordLevel(words.ids | {BEGIN: words.begin_id, END: words.end_id}, unk_token=UNKNOWN_WORD))
    rules.normalizer = normalizers.Lowercase()
    rules.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    rules.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, words.begin_id), (END, words.end_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=rules, bos_token=BEGIN, eos_token=END, pad_token=END, unk_token=UNKNOWN_WORD,
        model_max_length=tower.length,
    )  # fmt: skip


def text_tower(encoder: Path, tokenizer_folder: Path, weights: Mapping[str, Tensor]) -> TextTower:
    """The tower in transformers' folders of a text encoder and its tokenizer.

    Raises:
        UserError: a tokenizer that is neither CLIP's nor a list of words; the folder of another network.
    """
    config = read_object(encoder / "config.json", str(encoder / "config.json"))
    try:
        theirs = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # its files may say anything, and tokenizers raises plain exceptions
        raise UserError(f"the tokenizer in {tokenizer_folder} cannot be read: {shortened(str(error))}") from None
    name = "CLIPTextModelWithProjection"
    check_layers(config, name, str(encoder))
    return built(lambda: _tower(config, theirs, tokenizer_folder, weights), name, str(encoder))


def _tower(
    config: Mapping[str, Any], theirs: PreTrainedTokenizerFast, tokenizer_folder: Path, weights: Mapping[str, Tensor]
) -> TextTower:
    text = {
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "layers": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
    }
    if config["intermediate_size"] != 4 * config["hidden_size"]:
        text["mlp_ratio"] = config["intermediate_size"] / config["hidden_size"]
    settings = ClipSettings(
        embed_dim=config["projection_dim"],
        text_cfg=text,
        quick_gelu=config["hidden_act"] == "quick_gelu",
        words=_words(theirs, tokenizer_folder),
        pad_id=None if theirs.pad_token_id == theirs.eos_token_id else theirs.pad_token_id,
    )
    with torch.device("meta"):
        tower = TextTower(settings)
    own = {name: tensor for name, tensor in weights.items() if not name.endswith(".position_ids")}
    tower.model.load_state_dict(convert_hugging_face(own), strict=True, assign=True)
    return tower.requires_grad_(False).eval()


def _words(theirs: PreTrainedTokenizerFast, folder: Path) -> list[str] | None:
    """The words of a word tokenizer; None for CLIP's byte pairs."""
    vocabulary = theirs.get_vocab()
    ordered = sorted(vocabulary, key=vocabulary.get)
    if set(ordered[:-2]) == BytePairTokenizer().vocabulary.keys():
        return None
    if ordered[0] != UNKNOWN_WORD or ordered[-2:] != [theirs.bos_token, theirs.eos_token]:
        raise UserError(f"{folder} is no tokenizer that a text tower can have: neither CLIP's own nor a list of words")
    return ordered[1:-2]
