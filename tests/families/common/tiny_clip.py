"""Tiny CLIP text encoders and tokenizers of transformers, with random weights."""

import string
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = [*string.ascii_lowercase, "!"]


def write_tokenizer(folder: Path, pad: str = END) -> CLIPTokenizer:
    """Each letter is a token. The padding token is the end token (CLIP-L) or another one (`!`, bigG)."""
    words = [pad, *(letter for letter in LETTERS if letter != pad), *(f"{letter}</w>" for letter in LETTERS)]
    words = [*dict.fromkeys(word for word in words if word != END), BEGIN, END]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_encoder(
    folder: Path, tokenizer: CLIPTokenizer, seed: int, width: int = 16, projection: int | None = None, heads: int = 2
) -> torch.nn.Module:
    """A transformers folder with random weights; with a projection of this width where one is given."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=3,
        num_attention_heads=heads, projection_dim=projection or width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, hidden_act="quick_gelu",
    )  # fmt: skip
    torch.manual_seed(seed)
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def write_two_encoders(folder: Path) -> None:
    """Text encoders and tokenizers as in a folder of SDXL's pipeline."""
    write_encoder(folder / "text_encoder", write_tokenizer(folder / "tokenizer"), seed=1)
    second = write_tokenizer(folder / "tokenizer_2", pad="!")
    write_encoder(folder / "text_encoder_2", second, seed=2, width=24, projection=20)
