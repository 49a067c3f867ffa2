"""Phi-2, whose states of a text NOVA is told, as transformers has it."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from families.common.library_files import built, construct, each_tensor
from families.common.loaded_text import LoadedTextEncoder, pretrained_tokenizer
from families.common.text_conditions import TextConditions, Tokens
from families.common.weight_files import TEXT
from warpcore.errors import UserError
from warpcore.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LENGTH = 256
"""Tokens of a text that published networks read."""
PHI_2 = {
    "vocab_size": 51200, "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 32,
    "num_attention_heads": 32, "hidden_act": "gelu_new", "partial_rotary_factor": 0.4,
    "max_position_embeddings": 2048, "model_type": "phi",
}  # fmt: skip
"""Constructor numbers of Phi-2."""
MODEL, HEAD = "model.", "lm_head."
"""What the names of a file's tensors begin with: those of the encoder, and of layers that no text needs."""


class PhiTextEncoder(LoadedTextEncoder):
    """A frozen Phi and its tokenizer, in its own precision.

    A token sees earlier ones alone, so the states of a text depend on no padding: rows after it say nothing, and
    `TextEmbedding` of the network puts those of the empty text there. The empty text itself has no tokens.

    Args:
        config: of transformers' PhiForCausalLM.
        tokenizer: it, or its folder.
        length: tokens of a text that are read; nothing is put before or after them.
        key: the config key that an error names.

    Raises:
        UserError: the config is none of Phi's, the tokenizer is missing, or has ids that the encoder does not.
    """

    kind, title = "phi", "a Phi"

    def __init__(
        self,
        config: Mapping[str, Any],
        tokenizer: "Path | PreTrainedTokenizerBase",
        length: int = LENGTH,
        key: str = TEXT,
    ):
        super().__init__(config, tokenizer, length, key)

    @staticmethod
    def build_model(config: Mapping[str, Any], key: str) -> nn.Module:
        from transformers import PhiConfig, PhiModel

        settings = construct(PhiConfig, config, key)
        return built(partial(PhiModel, settings), PhiModel.__name__, key)

    @staticmethod
    def read_tokenizer(folder: Path, key: str) -> "PreTrainedTokenizerBase":
        from transformers import PreTrainedTokenizerFast

        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{key}: {folder} holds no tokenizer of Phi (tokenizer.json)")
        return pretrained_tokenizer(PreTrainedTokenizerFast, folder, key)

    @staticmethod
    def read_tensors(path: Path, key: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Without the head, which no text needs."""
        read = each_tensor(path, key, lambda name: not name.startswith(HEAD))
        return {name.removeprefix(MODEL): tensor.to(dtype) for name, tensor in read}

    def weights_are_kept(self) -> None:
        # Frequencies of positions are no weights: they are made, not read, and stay in float32.
        self.model.rotary_emb = type(self.model.rotary_emb)(self.model.config)

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids, cut to L, and filled up with 0 to the longest text; at least one column."""
        read = self.tokenizer(list(texts), max_length=self.length, truncation=True).input_ids
        columns = max([1, *map(len, read)])
        ids = torch.tensor([[*own, *[0] * (columns - len(own))] for own in read])
        return Tokens(ids, torch.arange(columns) < torch.tensor([[len(own)] for own in read]))

    def encode(self, tokens: Tokens) -> TextConditions:
        """The last hidden states of tokens, after the final norm; zeros after a text. `pooled` is None."""
        mask = to_device(tokens.mask, self.device)
        with self.in_own_precision():
            ids = to_device(tokens.ids, self.device)
            earlier = hiding_later(*ids.shape, self.model.embed_tokens.weight.dtype, self.device)
            hidden = self.model(ids, attention_mask=earlier, use_cache=False).last_hidden_state
        return TextConditions(hidden * mask[..., None], None, mask)


def hiding_later(texts: int, tokens: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What is added to attention scores (B, 1, N, N), so that a token sees itself and earlier ones.

    Without it the library asks the places of tokens what they hide, which would wait for the GPU.
    """
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=device).triu(1)
    return torch.zeros_like(later, dtype=dtype).masked_fill_(later, torch.finfo(dtype).min).expand(texts, 1, -1, -1)
