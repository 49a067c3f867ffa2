"""A small T5 encoder of few words, to train beside an image tower."""

import json
from collections.abc import Sequence

from torch import Tensor, nn

from families.common.library_files import CONFIG_KEY, constructor_numbers
from families.common.t5 import EMBEDDING_ALIAS, TOKENIZER_KEY, hiding, tokenizer_of
from modules.clip import ClipSettings

SPECIAL = ("<pad>", "</s>", "<unk>", "▁")
"""Ids 0 to 3; the last one begins a word that is not known."""


def word_pieces(words: Sequence[str]) -> list[tuple[str, float]]:
    """The pieces, with their scores, of a tokenizer that knows words and punctuation marks."""
    known = [f"▁{word}" if word.isalnum() else word for word in words]
    return [(piece, 0.0) for piece in SPECIAL] + [(piece, -1.0) for piece in known]


class T5Tower(nn.Module):
    """T5's encoder (arXiv:1910.10683, the first version) with random weights. `model` is transformers'.

    Attributes: `length` L, tokens of a text that are read, `</s>` included.

    Args:
        settings: the words that it knows, its sizes in `text_cfg`, and the width P that texts are pooled to.
    """

    def __init__(self, settings: ClipSettings):
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        sizes = settings.text_cfg
        width, heads = sizes["width"], sizes["heads"]
        self.pieces, self.length = word_pieces(settings.words), sizes["context_length"]
        self.tokenizer = tokenizer_of(self.pieces)
        self.model = T5EncoderModel(T5Config(
            vocab_size=len(self.pieces), d_model=width, d_kv=width // heads, d_ff=4 * width,
            num_layers=sizes["layers"], num_heads=heads, dropout_rate=0.0,
        ))  # fmt: skip
        self.model.set_input_embeddings(self.model.shared)  # one table under both of its names
        self.projection = nn.Linear(width, settings.embed_dim)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) int64, cut and padded, and mask (B, L) bool of the tokens, both on the CPU."""
        read = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return read.input_ids, read.attention_mask.bool()

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Of token ids (B, L) and their mask, the last hidden states (B, L, D), and a projection (B, P) of the mean
        over each text's tokens."""
        hidden = self.model(ids, attention_mask=hiding(mask, self.model.dtype)).last_hidden_state
        shares = mask / mask.sum(dim=1, keepdim=True)
        return hidden, self.projection((hidden * shares[..., None]).sum(dim=1))

    def weights_to_save(self) -> dict[str, Tensor]:
        """The encoder's weights under transformers' names."""
        return {name: tensor for name, tensor in self.model.state_dict().items() if name != EMBEDDING_ALIAS}

    def metadata_to_save(self) -> dict[str, str]:
        """Config and tokenizer, with which `families.common.t5.T5TextEncoder` loads the file."""
        config = constructor_numbers(self.model.config.to_diff_dict())
        return {CONFIG_KEY: json.dumps(config), TOKENIZER_KEY: json.dumps(self.pieces)}
