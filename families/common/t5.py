"""T5's text encoder (arXiv:1910.10683) of transformers, of any size: the first version, v1.1, and the mini."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from families.common.library_files import built, construct, each_tensor
from families.common.loaded_text import FOLDER, LoadedTextEncoder, pretrained_tokenizer
from families.common.precision import Precision
from families.common.text_conditions import TextConditions, Tokens
from families.common.weight_files import metadata_of
from warpcore.errors import UserError
from warpcore.safe_json import parse_json
from warpcore.transfer import to_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T5_XXL = {
    "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6, "architectures": ["T5EncoderModel"],
}  # fmt: skip
"""Of transformers' T5EncoderModel: T5 v1.1 XXL."""
T5_XXL_NAME = "DeepFloyd/t5-v1_1-xxl"
"""Where it is by default, as a config names it."""
TOKENIZER_KEY = "tokenizer"
"""Where a single file holds its tokenizer: JSON, [[piece, score], ...] in the order of their ids."""
EMBEDDING, EMBEDDING_ALIAS = "shared.weight", "encoder.embed_tokens.weight"
"""The names of one tensor; files have either or both."""
_NOT_OF_ENCODER = ("decoder.", "lm_head.")
Padding = Literal["zeros", "states"]


class T5TextEncoder(LoadedTextEncoder):
    """A frozen T5 encoder and its tokenizer, in its own precision.

    The states of a text do not depend on its padding, which the encoder does not see: texts are only padded to the
    longest of a batch, and as `lengths` tell where each ends, a cache stores them trimmed. `padded` gives a network a
    fixed number of rows, `token_mask` masks.

    Args:
        config: of transformers' T5EncoderModel, or of a whole T5.
        tokenizer: it, or the folder of its T5Tokenizer.
        length: L, tokens of a text that are read, `</s>` included.
        padding: the states after the last token are `zeros`; or those that T5 gives for L padded tokens, as pipelines
            without masks read them (`states`).
        zeros_for_empty: the condition of the empty text is one row of zeros, instead of the state of its `</s>`.
        clean: what is done to a text before it is read.
        key: the config key that an error names.

    Raises:
        UserError: the config is none of T5's, the tokenizer is missing, or has ids that the encoder does not.
    """

    kind, title = "t5", "a T5 encoder"

    def __init__(
        self,
        config: Mapping[str, Any],
        tokenizer: "Path | PreTrainedTokenizerBase",
        length: int = 512,
        padding: Padding = "zeros",
        zeros_for_empty: bool = False,
        clean: Callable[[str], str] = str,
        key: str = FOLDER,
    ):
        super().__init__(config, tokenizer, length, key)
        self.padding, self.zeros_for_empty, self.clean = padding, zeros_for_empty, clean

    @classmethod
    def of(cls, *given: Any, precision: Precision = "float32", key: str = FOLDER, **options: Any) -> Self:
        """Raises UserError for float16, in which T5 overflows, too."""
        if precision == "float16":
            raise UserError(f"{key}: T5 overflows in float16; write bfloat16, float32 or nf4")
        return super().of(*given, precision=precision, key=key, **options)

    @staticmethod
    def build_model(config: Mapping[str, Any], key: str) -> nn.Module:
        from transformers import T5Config, T5EncoderModel

        settings = construct(T5Config, config, key)
        return built(partial(T5EncoderModel, settings), T5EncoderModel.__name__, key)

    @staticmethod
    def read_tokenizer(folder: Path, key: str) -> "PreTrainedTokenizerBase":
        from transformers import T5Tokenizer

        if not (folder / "tokenizer.json").is_file():
            if not (folder / "spiece.model").is_file():
                raise UserError(f"{key}: {folder} holds no tokenizer of T5 (tokenizer.json or spiece.model)")
            if find_spec("sentencepiece") is None:
                raise UserError(f"{key}: {folder / 'spiece.model'} needs a package: pip install sentencepiece")
        return pretrained_tokenizer(T5Tokenizer, folder, key)

    @staticmethod
    def read_tensors(path: Path, key: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Under all of their names. A whole T5 has a decoder too, which is not read."""
        read = each_tensor(path, key, lambda name: not name.startswith(_NOT_OF_ENCODER))
        found = {name: tensor.to(dtype) for name, tensor in read}
        if (embedding := found.get(EMBEDDING, found.get(EMBEDDING_ALIAS))) is not None:
            found |= {EMBEDDING: embedding, EMBEDDING_ALIAS: embedding}
        return found

    @staticmethod
    def tokenizer_in(file: Path, key: str) -> "PreTrainedTokenizerBase":
        try:
            pieces = [(str(piece), float(score)) for piece, score in parse_json(metadata_of(file)[TOKENIZER_KEY])]
            return tokenizer_of(pieces)
        except Exception as error:  # the Rust library behind it has exceptions of its own
            raise UserError(f"{key}: {file} holds no tokenizer of T5: {error!r}") from None

    def weights_are_read(self) -> None:
        self.model.set_input_embeddings(self.model.shared)  # one tensor again, under both of its names

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids, cut to L with `</s>` as the last, padded to the longest text, or to L for `padding: states`."""
        padding = "longest" if self.padding == "zeros" else "max_length"
        read = self.tokenizer(
            [self.clean(text) for text in texts],
            padding=padding,
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        return Tokens(read.input_ids, read.attention_mask.bool())

    def encode(self, tokens: Tokens) -> TextConditions:
        """The last hidden states of tokens, in the precision of the encoder; `pooled` is None."""
        mask = to_device(tokens.mask, self.device)
        with self.in_own_precision():
            ids = to_device(tokens.ids, self.device)
            hidden = self.model(ids, attention_mask=hiding(mask, self.dtype)).last_hidden_state
        seen = mask if self.padding == "zeros" else torch.ones_like(mask)
        if self.zeros_for_empty:
            seen = seen & (mask.sum(dim=1, keepdim=True) > 1)  # more than `</s>`
        return TextConditions(hidden * seen[..., None], None, mask)

    @property
    def dtype(self) -> torch.dtype:
        """That of its states."""
        return self.model.shared.weight.dtype


def hiding(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores (B, 1, 1, L), to hide tokens that are not of a mask (B, L).

    Given a plain mask, the library asks it whether it hides anything, which would wait for the GPU.
    """
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)[:, None, None]


def padded(hidden: Tensor, length: int) -> Tensor:
    """States (B, N, D) with rows of zeros after them: (B, L, D)."""
    return F.pad(hidden, (0, 0, 0, length - hidden.shape[1]))


def token_mask(lengths: Tensor, length: int) -> Tensor:
    """(B, L) bool: where texts with `lengths` (B,) have tokens."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]


def tokenizer_of(pieces: Sequence[tuple[str, float]]) -> "PreTrainedTokenizerBase":
    """A T5Tokenizer of pieces with their scores; the first three are `<pad>`, `</s>` and `<unk>`."""
    from transformers import T5Tokenizer

    return T5Tokenizer(vocab=list(pieces), extra_ids=0)


class StandInTokenizer:
    """In place of a tokenizer where only shapes are wanted, without files: texts are as long as they may be."""

    def __len__(self) -> int:
        return 0

    def __call__(
        self, texts: Sequence[str], max_length: int, return_tensors: str | None = None, **options: Any
    ) -> SimpleNamespace:
        if return_tensors is None:  # asked which texts are cut: none
            return SimpleNamespace(input_ids=[[1]] * len(texts))
        ids = torch.ones(len(texts), max_length, dtype=torch.int64)
        return SimpleNamespace(input_ids=ids, attention_mask=ids)
