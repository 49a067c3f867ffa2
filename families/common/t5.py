"""T5's text encoder (arXiv:1910.10683) of transformers, of any size: the first version, v1.1, and the mini."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
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
from families.common.weight_files import metadata_of
from families.common.weights import are_only_shapes
from warpcore.errors import UserError
from warpcore.meta import META
from warpcore.safe_json import parse_json
from warpcore.text import brief, shortened
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


class T5TextEncoder(LibraryTextEncoder):
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

    def __init__(
        self,
        config: Mapping[str, Any],
        tokenizer: "Path | PreTrainedTokenizerBase",
        length: int = 512,
        padding: Padding = "zeros",
        zeros_for_empty: bool = False,
        clean: Callable[[str], str] = str,
        key: str = "text_encoder",
    ):
        super().__init__()
        from transformers import T5Config, T5EncoderModel

        if (kind := config.get("model_type", "t5")) != "t5":
            raise UserError(f"{key}: its config is that of {brief(kind)}, not of t5")
        settings = construct(T5Config, config, key)
        self.model = (
            built(partial(T5EncoderModel, settings), T5EncoderModel.__name__, key).eval().requires_grad_(False)
        )
        self.key, self._length, self.padding, self.zeros_for_empty = key, length, padding, zeros_for_empty
        self.clean = clean
        self.tokenizer = _read_tokenizer(tokenizer, key) if isinstance(tokenizer, str | Path) else tokenizer
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise UserError(
                f"{key}: the tokenizer has {len(self.tokenizer)} tokens, the encoder {self.model.config.vocab_size}"
            )

    @classmethod
    def load(
        cls,
        path: Path,
        tokenizer: Path | None = None,
        *,
        subfolder: str = "text_encoder",
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        key: str = "text_encoder",
        **options: Any,
    ) -> "T5TextEncoder":
        """With the weights of a transformers folder (safetensors or `pytorch_model.bin`, one file or several), of a
        pipeline's that has it as `subfolder`, or of a file as `train/train_towers.py` writes.

        Args:
            tokenizer: by default the folder beside the encoder's (`tokenizer`, `tokenizer_2`, ...), or its own.
            device: where matrices go to be put into four bits (`nf4`).
            options: `length`, `padding`, `zeros_for_empty` and `clean`.

        Raises:
            UserError: files are missing or made for another network; or float16, in which T5 overflows.
        """
        path = component_folder(Path(path), subfolder)
        config = read_config(path, key)
        if config is None:
            raise UserError(f"{key}: {path} has no config.json: name the folder of a T5 encoder of transformers")
        if tokenizer is None and path.is_file():
            tokenizer = _tokenizer_in(path, key)
        elif tokenizer is None:
            beside = path.with_name(subfolder.replace("text_encoder", "tokenizer"))
            tokenizer = beside if path.name == subfolder and beside.is_dir() else path
        read = partial(_encoder_tensors, path, key)
        return cls.of(config, tokenizer, read, path, precision=precision, device=device, key=key, **options)

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        tokenizer: "Path | PreTrainedTokenizerBase",
        tensors: Callable[[torch.dtype], Mapping[str, Tensor]],
        path: Path,
        *,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        key: str = "text_encoder",
        **options: Any,
    ) -> "T5TextEncoder":
        """With weights that `tensors` gives, in a dtype, when they are wanted; `path`, where they are from, is named
        in errors. Other arguments and errors as in `load`.
        """
        if precision == "float16":
            raise UserError(f"{key}: T5 overflows in float16; write bfloat16, float32 or nf4")
        with torch.device("meta"):
            encoder = cls(config, tokenizer, key=key, **options)
        dtype = torch.bfloat16 if precision == "nf4" else getattr(torch, precision)
        if are_only_shapes():
            freeze(encoder.model, precision, key, META)
            return encoder
        fill(encoder.model, tensors(dtype), path, key, dtype)
        encoder.model.set_input_embeddings(encoder.model.shared)  # one tensor again, under both of its names
        freeze(encoder.model, precision, key, device)
        return encoder

    @property
    def length(self) -> int:
        """L: tokens of a text that are read, `</s>` included."""
        return self._length

    @property
    def width(self) -> int:
        """D."""
        return self.model.config.d_model

    @property
    def config(self) -> dict[str, Any]:
        """What `of` takes to build it again."""
        return constructor_numbers(self.model.config.to_diff_dict())

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


def _encoder_tensors(path: Path, key: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The encoder's tensors under all of their names. A whole T5 has a decoder too, which is not read."""
    found = {
        name: tensor.to(dtype) for name, tensor in each_tensor(path, key, lambda n: not n.startswith(_NOT_OF_ENCODER))
    }
    if (embedding := found.get(EMBEDDING, found.get(EMBEDDING_ALIAS))) is not None:
        found |= {EMBEDDING: embedding, EMBEDDING_ALIAS: embedding}
    return found


def _read_tokenizer(folder: Path, key: str) -> "PreTrainedTokenizerBase":
    from transformers import T5Tokenizer

    if not (folder / "tokenizer.json").is_file():
        if not (folder / "spiece.model").is_file():
            raise UserError(f"{key}: {folder} holds no tokenizer of T5 (tokenizer.json or spiece.model)")
        if find_spec("sentencepiece") is None:
            raise UserError(f"{key}: {folder / 'spiece.model'} needs a package: pip install sentencepiece")
    try:
        return T5Tokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its files may say anything, and tokenizers raises plain exceptions
        raise UserError(f"{key}: the tokenizer in {folder} cannot be read: {shortened(str(error))}") from None


def _tokenizer_in(file: Path, key: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a single file."""
    try:
        pieces = [(str(piece), float(score)) for piece, score in parse_json(metadata_of(file)[TOKENIZER_KEY])]
        return tokenizer_of(pieces)
    except Exception as error:  # the Rust library behind it has exceptions of its own
        raise UserError(f"{key}: {file} holds no tokenizer of T5: {error!r}") from None


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
