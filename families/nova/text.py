"""Phi-2, whose states of a text NOVA is told, as transformers has it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from families.common.library_files import (
    built,
    component_folder,
    construct,
    constructor_numbers,
    each_tensor,
    fill,
    read_config,
)
from families.common.precision import Precision, freeze
from families.common.text_conditions import LibraryTextEncoder, TextConditions, Tokens
from families.common.weight_files import TEXT
from families.common.weights import are_only_shapes
from warpcore.errors import UserError
from warpcore.meta import META
from warpcore.text import brief, shortened
from warpcore.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART, TOKENIZER = "text_encoder", "tokenizer"
"""Their folders in a pipeline's."""
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


class PhiTextEncoder(LibraryTextEncoder):
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

    def __init__(
        self,
        config: Mapping[str, Any],
        tokenizer: "Path | PreTrainedTokenizerBase",
        length: int = LENGTH,
        key: str = TEXT,
    ):
        super().__init__()
        from transformers import PhiConfig, PhiModel

        if (kind := config.get("model_type", "phi")) != "phi":
            raise UserError(f"{key}: its config is that of {brief(kind)}, not of phi")
        settings = construct(PhiConfig, config, key)
        self.model = built(partial(PhiModel, settings), PhiModel.__name__, key).eval().requires_grad_(False)
        self.key, self._length = key, length
        self.tokenizer = _read_tokenizer(tokenizer, key) if isinstance(tokenizer, Path) else tokenizer
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise UserError(
                f"{key}: the tokenizer has {len(self.tokenizer)} tokens, the encoder {self.model.config.vocab_size}"
            )

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        key: str = TEXT,
        length: int = LENGTH,
    ) -> "PhiTextEncoder":
        """With the weights of a transformers folder, or of a pipeline's that has it as `text_encoder`; the tokenizer
        is in the folder `tokenizer` beside it, or in its own.

        device: where matrices go to be put into four bits (`nf4`).

        Raises:
            UserError: files are missing or made for another network.
        """
        path = component_folder(path, PART)
        config = read_config(path, key)
        if config is None:
            raise UserError(f"{key}: {path} has no config.json: name the folder of a Phi of transformers")
        beside = path.with_name(TOKENIZER)
        folder = beside if path.name == PART and beside.is_dir() else path
        read = partial(_encoder_tensors, path, key)
        return cls.of(config, folder, read, path, precision=precision, device=device, key=key, length=length)

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        tokenizer: "Path | PreTrainedTokenizerBase",
        tensors: Callable[[], Mapping[str, Tensor]],
        path: Path,
        *,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        key: str = TEXT,
        length: int = LENGTH,
    ) -> "PhiTextEncoder":
        """With weights that `tensors` gives when they are wanted; `path`, where they are from, is named in errors."""
        with torch.device("meta"):
            encoder = cls(config, tokenizer, length, key)
        if are_only_shapes():
            freeze(encoder.model, precision, key, META)
            return encoder
        fill(encoder.model, tensors(), path, key, torch.bfloat16 if precision == "nf4" else getattr(torch, precision))
        freeze(encoder.model, precision, key, device)
        # Frequencies of positions are no weights: they are made, not read, and stay in float32.
        encoder.model.rotary_emb = type(encoder.model.rotary_emb)(encoder.model.config)
        return encoder

    @property
    def length(self) -> int:
        return self._length

    @property
    def width(self) -> int:
        """D."""
        return self.model.config.hidden_size

    @property
    def config(self) -> dict[str, Any]:
        """What `of` takes to build it again."""
        return constructor_numbers(self.model.config.to_diff_dict())

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


def _encoder_tensors(path: Path, key: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(MODEL): tensor
        for name, tensor in each_tensor(path, key, lambda name: not name.startswith(HEAD))
    }


def _read_tokenizer(folder: Path, key: str) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{key}: {folder} holds no tokenizer of Phi (tokenizer.json)")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its files may say anything, and tokenizers raises plain exceptions
        raise UserError(f"{key}: the tokenizer in {folder} cannot be read: {shortened(str(error))}") from None
