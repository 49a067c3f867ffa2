"""Tiny T5 encoders and tokenizers of transformers, with random weights."""

import string
from pathlib import Path

import torch
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration, T5Tokenizer

PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
PIECES += [(piece, -3.0) for letter in string.ascii_lowercase + "," for piece in (letter, f"▁{letter}")]
"""Each letter is a token, and so is each that begins a word."""


def write_tokenizer(folder: Path) -> T5Tokenizer:
    tokenizer = T5Tokenizer(vocab=PIECES, extra_ids=0)
    tokenizer.save_pretrained(folder)
    return tokenizer


def t5_config(width: int = 16, heads: int = 2, gated: bool = False) -> T5Config:
    return T5Config(
        vocab_size=len(PIECES) + 4, d_model=width, d_kv=width // heads, d_ff=3 * width, num_layers=2, num_heads=heads,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip


def write_t5(folder: Path, seed: int = 1, whole: bool = False, **numbers) -> T5EncoderModel:
    """A folder of transformers with random weights of an encoder, or of a whole T5; gives the encoder."""
    torch.manual_seed(seed)
    model = (T5ForConditionalGeneration if whole else T5EncoderModel)(t5_config(**numbers)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model
