"""Text encoders of transformers out of their folders: what loading a T5 and a Phi has in common."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from families.common.library_files import component_folder, constructor_numbers, fill, read_config
from families.common.precision import Precision, freeze
from families.common.text_conditions import LibraryTextEncoder
from warpcore.errors import UserError
from warpcore.meta import META, are_only_shapes
from warpcore.text import brief, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER = "text_encoder"
"""In a pipeline's."""


class LoadedTextEncoder(LibraryTextEncoder):
    """A frozen text encoder and its tokenizer, in its own precision; `model` is transformers'.

    Args:
        config: of the encoder, or of a whole model that has it.
        tokenizer: it, or its folder.
        length: tokens of a text that are read.
        key: the config key that an error names.

    Raises:
        UserError: the config is of another network, the tokenizer is missing, or has ids that the encoder does not.
    """

    kind: ClassVar[str]
    """What configs call it (`model_type`)."""
    title: ClassVar[str]
    """Its name in messages, with its article."""

    def __init__(
        self, config: Mapping[str, Any], tokenizer: "Path | PreTrainedTokenizerBase", length: int, key: str = FOLDER
    ):
        super().__init__()
        if (kind := config.get("model_type", self.kind)) != self.kind:
            raise UserError(f"{key}: its config is that of {brief(kind)}, not of {self.kind}")
        self.model = self.build_model(config, key).eval().requires_grad_(False)
        self.key, self._length = key, length
        self.tokenizer = self.read_tokenizer(Path(tokenizer), key) if isinstance(tokenizer, str | Path) else tokenizer
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise UserError(
                f"{key}: the tokenizer has {len(self.tokenizer)} tokens, the encoder {self.model.config.vocab_size}"
            )

    # ---------------------------------------------------------------- what an encoder says

    @staticmethod
    def build_model(config: Mapping[str, Any], key: str) -> nn.Module:
        """The network of transformers for a config."""
        raise NotImplementedError

    @staticmethod
    def read_tokenizer(folder: Path, key: str) -> "PreTrainedTokenizerBase":
        """The tokenizer in a folder."""
        raise NotImplementedError

    @staticmethod
    def read_tensors(path: Path, key: str, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """The encoder's tensors in a folder or file, under its names."""
        raise NotImplementedError

    @staticmethod
    def tokenizer_in(file: Path, key: str) -> "Path | PreTrainedTokenizerBase":
        """The tokenizer of a single file of weights."""
        return file

    def weights_are_read(self) -> None:
        """Called when the weights are there, before they are kept in the encoder's precision."""

    def weights_are_kept(self) -> None:
        """Called after that."""

    # ---------------------------------------------------------------- loading

    @classmethod
    def load(
        cls,
        path: Path,
        tokenizer: Path | None = None,
        *,
        subfolder: str = FOLDER,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        key: str = FOLDER,
        **options: Any,
    ) -> Self:
        """With the weights of a transformers folder (safetensors or `pytorch_model.bin`, one file or several), of a
        pipeline's that has it as `subfolder`, or of a file that holds config and tokenizer.

        Args:
            tokenizer: by default the folder beside the encoder's (`tokenizer`, `tokenizer_2`, ...), or its own.
            device: where matrices go to be put into four bits (`nf4`).
            options: other arguments of the class.

        Raises:
            UserError: files are missing or made for another network, or it can't be kept in this precision.
        """
        path = component_folder(Path(path), subfolder)
        config = read_config(path, key)
        if config is None:
            raise UserError(f"{key}: {path} has no config.json: name the folder of {cls.title} of transformers")
        if tokenizer is None and path.is_file():
            tokenizer = cls.tokenizer_in(path, key)
        elif tokenizer is None:
            beside = path.with_name(subfolder.replace("text_encoder", "tokenizer"))
            tokenizer = beside if path.name == subfolder and beside.is_dir() else path
        read = partial(cls.read_tensors, path, key)
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
        key: str = FOLDER,
        **options: Any,
    ) -> Self:
        """With weights that `tensors` gives, in a dtype, when they are wanted; `path`, where they are from, is named
        in errors. Other arguments and errors as in `load`.
        """
        with torch.device("meta"):
            encoder = cls(config, tokenizer, key=key, **options)
        if are_only_shapes():
            freeze(encoder.model, precision, key, META)
            return encoder
        dtype = torch.bfloat16 if precision == "nf4" else getattr(torch, precision)
        fill(encoder.model, tensors(dtype), path, key, dtype)
        encoder.weights_are_read()
        freeze(encoder.model, precision, key, device)
        encoder.weights_are_kept()
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


def pretrained_tokenizer(kind: type, folder: Path, key: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a class of transformers in a folder. Raises UserError where its files can't be read."""
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its files may say anything, and tokenizers raises plain exceptions
        raise UserError(f"{key}: the tokenizer in {folder} cannot be read: {shortened(str(error))}") from None
