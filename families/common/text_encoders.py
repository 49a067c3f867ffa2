"""CLIP text encoders (arXiv:2103.00020) of transformers: Stable Diffusion's one, or SDXL's two (arXiv:2307.01952)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from families.common.library_files import (
    built,
    class_names,
    component_folder,
    construct,
    constructor_numbers,
    fill,
    read_config,
    read_tensors,
)
from families.common.precision import FrozenNetwork, Precision, freeze
from families.common.text_conditions import LibraryTextEncoder, TextConditions, Tokens
from modules.clip import text_tower
from modules.clip_weights import read_settings
from warpcore.errors import UserError
from warpcore.meta import META, are_only_shapes
from warpcore.text import shortened
from warpcore.transfer import to_device

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, PreTrainedTokenizerBase

LENGTH = 77
"""L of CLIP: tokens per text, the begin and the end token included."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HiddenState:
    """Which hidden states of an encoder are the condition."""

    skip_layers: int = 0
    """Layers left out at the end: 1 is the second-to-last hidden state ("clip skip 2")."""
    final_norm: bool = True
    """Whether the encoder's final layer norm is applied."""


LAST = HiddenState()
"""Stable Diffusion 1.5."""
PENULTIMATE = HiddenState(skip_layers=1, final_norm=False)
"""Both encoders of SDXL."""


class ClipTextEncoder(LibraryTextEncoder):
    """A frozen CLIP text encoder and its tokenizer, in its own precision."""

    chunks = 1
    """Parts in which longer texts are read, see `tokenize`."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tokenizer: "Path | PreTrainedTokenizerBase",
        hidden: HiddenState = LAST,
        key: str = "text_encoder",
    ):
        """With random weights in float32, on the current default device.

        Args:
            config: of transformers' CLIPTextModel. One that names CLIPTextModelWithProjection in `architectures` gives
                pooled vectors too.
            tokenizer: it, or the folder of its CLIPTokenizer.
            key: the config key that an error names.

        Raises:
            UserError: the tokenizer is missing, or has ids that the encoder does not.
        """
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        self.projects = "CLIPTextModelWithProjection" in class_names(config)
        settings = construct(CLIPTextConfig, config, key)
        kind = CLIPTextModelWithProjection if self.projects else CLIPTextModel
        self.model = built(partial(kind, settings), kind.__name__, key).eval()
        self.key, self.hidden = key, hidden
        self.window = min(LENGTH, settings.max_position_embeddings)
        named = isinstance(tokenizer, str | Path)
        self.tokenizer = _read_tokenizer(Path(tokenizer), key) if named else tokenizer
        tokens = len(self.tokenizer)
        if tokens > settings.vocab_size:
            raise UserError(
                f"{key}: the tokenizer {tokenizer if named else 'of the public CLIP models'} has {tokens} tokens, the "
                f"encoder {settings.vocab_size}"
            )
        if not 0 <= hidden.skip_layers < settings.num_hidden_layers:
            layers = settings.num_hidden_layers
            raise UserError(
                f"{key}: clip_skip {hidden.skip_layers + 1} of {layers} layers; write a number from 1 to {layers}"
            )
        self.model.requires_grad_(False)
        self._warned = self._finds_end = False

    @classmethod
    def load(
        cls,
        path: Path,
        tokenizer: Path | None = None,
        hidden: HiddenState = LAST,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        key: str = "text_encoder",
        number: int = 1,
    ) -> "ClipTextEncoder":
        """With the weights of a transformers folder, of a pipeline's that has it as `text_encoder`, or of the file
        of a text tower, as `train/train_towers.py` writes.

        Args:
            tokenizer: by default the folder `tokenizer` beside the encoder's, or its own.
            device: where matrices go to be put into four bits (`nf4`).
            number: which of a pipeline's encoders; 2 is `text_encoder_2`.

        Raises:
            UserError: files are missing or made for another network.
        """
        suffix = "" if number == 1 else f"_{number}"
        path = component_folder(Path(path), f"text_encoder{suffix}")
        config = read_config(path, key)
        if config is not None:
            beside, tensors = path.with_name(f"tokenizer{suffix}"), partial(read_tensors, path, key)
            tokenizer = tokenizer or (beside if beside.is_dir() else path)
        elif path.is_file() and (tower := _tower(path, key)) is not None:
            config, own_tokenizer, tensors = tower
            tokenizer = tokenizer or own_tokenizer
        else:
            raise UserError(f"{key}: {path} has no config.json: name the folder of a text encoder of transformers")
        return cls.of(config, tokenizer, tensors, path, hidden, precision, device, key)

    @classmethod
    def of(
        cls,
        config: Mapping[str, Any],
        tokenizer: "Path | PreTrainedTokenizerBase",
        tensors: Callable[[], Mapping[str, Tensor]],
        path: Path,
        hidden: HiddenState = LAST,
        precision: Precision = "float32",
        device: torch.device | str = "cpu",
        key: str = "text_encoder",
    ) -> "ClipTextEncoder":
        """With weights that `tensors` gives when they are wanted; `path`, where they are from, is named in errors.

        Raises:
            UserError: they are made for another network.
        """
        if "clip" not in (kind := str(config.get("model_type", "clip"))):
            raise UserError(
                f"{key}: {path} holds a text encoder of the type {shortened(kind)}; here one of CLIP is read"
            )
        with torch.device("meta"):
            encoder = cls(config, tokenizer, hidden, key)
        dtype = getattr(torch, "bfloat16" if precision == "nf4" else precision)
        if are_only_shapes():
            freeze(encoder.model, precision, key, META)
            return encoder
        own = encoder.model.state_dict().keys()
        found = {_own_name(name, own): tensor for name, tensor in tensors().items()}
        found = {name: tensor for name, tensor in found.items() if not name.endswith("position_ids")}
        fill(encoder.model, found, path, key, dtype)
        _make_positions(encoder.model)
        freeze(encoder.model, precision, key, device)
        return encoder

    @property
    def length(self) -> int:
        """L: tokens of a text that are read, the begin and the end token included."""
        return self.chunks * (self.window - 2) + 2

    def tokenize(self, texts: Sequence[str]) -> Tokens:
        """Token ids, cut and padded to L. That texts are too long is logged once.

        With several `chunks`, L is more than the network reads at once: each chunk of 75 tokens gets a begin and an
        end token of its own, as in kohya's sd-scripts with `max_token_length` 150 and 225.
        """
        too_long = 0 if self._warned else sum(self.are_cut(texts))
        if too_long:
            self._warned = True
            logger.warning("%s: %d of %d texts are cut to %d tokens", self.key, too_long, len(texts), self.length)
        read = self.tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        mask = read.attention_mask.bool()
        return Tokens(read.input_ids if self.chunks == 1 else self._in_chunks(read.input_ids, mask), mask)

    def _in_chunks(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids (B, L) with a begin and an end token around each chunk."""
        begin, end, pad = (getattr(self.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad"))
        body, used = (values[:, 1:-1].unflatten(1, (self.chunks, -1)) for values in (ids, mask))
        first = torch.where(used[..., :1], body[..., :1], end)  # a chunk without text ends at once
        goes_on = used[..., -1:] & (body[..., -1:] != end)
        last = torch.where(goes_on, end, torch.where(mask[:, -1:, None], end, pad))
        parts = [torch.full_like(first, begin), first, body[..., 1:], last]
        return torch.cat(parts, dim=-1).flatten(1)

    @property
    def transformer(self) -> nn.Module:
        """The part of the library's network that has the embeddings and the layers."""
        return self.model.text_model if self.projects else self.model

    def unread(self, pooled: bool) -> list[nn.Module]:
        """The parts whose output no condition is made of: those behind the hidden state that is read.

        pooled: whether the pooled vector is read, too, which the whole encoder makes.
        """
        if pooled and self.projects:
            return []
        layers = self.transformer.encoder.layers
        behind = [*layers[len(layers) - self.hidden.skip_layers :]]
        behind += [] if self.hidden.final_norm else [self.transformer.final_layer_norm]
        return behind + ([self.model.text_projection] if self.projects else [])

    @property
    def token_embedding(self) -> nn.Module:
        """Makes (B, L, D) of token ids (B, L)."""
        return self.transformer.embeddings.token_embedding

    @property
    def config(self) -> dict[str, Any]:
        """What `of` takes to build it again."""
        kind = "CLIPTextModelWithProjection" if self.projects else "CLIPTextModel"
        return constructor_numbers(self.model.config.to_diff_dict()) | {"architectures": [kind]}

    @property
    def width(self) -> int:
        """D."""
        return self.model.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return len(self.tokenizer)

    @property
    def vocabulary(self) -> dict[str, int]:
        """The tokens that stand for text, with their ids."""
        special = {*self.tokenizer.all_special_tokens}
        return {token: i for token, i in self.tokenizer.get_vocab().items() if token not in special}

    def extend(self, embedding: nn.Module, names: Sequence[str]) -> None:
        """Embed token ids with another table, and read further tokens, see `modules.tokens.TextEncoder`."""
        from transformers import AddedToken

        self.transformer.embeddings.token_embedding = embedding
        self.tokenizer.add_tokens([AddedToken(name, normalized=True) for name in names])
        self._finds_end = self._finds_end or bool(names)

    def encode(self, tokens: Tokens) -> TextConditions:
        """The conditions of tokens, in the precision of the encoder. Padded positions are seen, as in diffusers."""
        with self.in_own_precision():
            ids = tokens.ids.view(-1, self.window)  # a row for each chunk
            output = self.model(to_device(ids, self.device), output_hidden_states=True)
            hidden = output.hidden_states[-1 - self.hidden.skip_layers]
            if self.hidden.final_norm:
                hidden = self.transformer.final_layer_norm(hidden)
            pooled = output.text_embeds if self.projects else None
            if self.projects and self._finds_end:
                # Published configs let the library take the highest id for the end token, which is now another.
                ends = to_device((ids == self.tokenizer.eos_token_id).int().argmax(dim=1), self.device)
                at_end = output.last_hidden_state[torch.arange(len(ends), device=self.device), ends]
                pooled = self.model.text_projection(at_end)
        if self.chunks > 1:  # the begin of the first chunk, what stands in each, the end of the last
            parts = hidden.unflatten(0, (-1, self.chunks))
            hidden = torch.cat([parts[:, 0, :1], parts[:, :, 1:-1].flatten(1, 2), parts[:, -1, -1:]], dim=1)
            pooled = None if pooled is None else pooled[:: self.chunks]  # of the first chunk
        return TextConditions(hidden, pooled, to_device(tokens.mask, self.device))


class ClipTextEncoders(FrozenNetwork):
    """One or several encoders as one: hidden states beside each other, the pooled vector of the last.

    zeros_for_empty: the conditions of the empty text are zeros, as SDXL's published pipeline takes them for guidance
        (`force_zeros_for_empty_prompt`), instead of those that the encoders give.
    chunks: in how many parts each encoder reads texts that are longer than it can read at once.
    """

    forward_methods = ("encode",)

    def __init__(self, encoders: Sequence[ClipTextEncoder], zeros_for_empty: bool = False, chunks: int = 1):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        for encoder in encoders:
            encoder.chunks = chunks
        self.zeros_for_empty = zeros_for_empty

    def set_activation_checkpointing(self, level: int) -> None:
        """From level 1 on, every layer computes its activations again in the backward pass."""
        for layer in (layer for encoder in self.encoders for layer in encoder.transformer.encoder.layers):
            layer.gradient_checkpointing = level > 0
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    @property
    def length(self) -> int:
        """L."""
        return self.encoders[0].length

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        """Which texts have more than L tokens; all CLIP text encoders read the same ones."""
        return self.encoders[0].are_cut(texts)

    def tokenize(self, texts: Sequence[str]) -> list[Tokens]:
        """The tokens of texts for each encoder."""
        return [encoder.tokenize(texts) for encoder in self.encoders]

    def encode(self, tokens: Sequence[Tokens]) -> TextConditions:
        """The conditions of the tokens of each encoder, in the precision of the last."""
        parts = [encoder.encode(own) for encoder, own in zip(self.encoders, tokens, strict=True)]
        dtype = parts[-1].hidden.dtype
        hidden = torch.cat([part.hidden.to(dtype) for part in parts], dim=-1)
        pooled, mask = parts[-1].pooled, torch.stack([part.mask for part in parts]).any(dim=0)
        if self.zeros_for_empty:
            said = (mask.sum(dim=1) > 2).to(dtype)  # more than the begin and the end token
            hidden = hidden * said[:, None, None]
            pooled = None if pooled is None else pooled * said[:, None]
        return TextConditions(hidden, pooled, mask)

    def forward(self, texts: Sequence[str]) -> TextConditions:
        """The conditions of texts."""
        return self.encode(self.tokenize(texts))


def _read_tokenizer(folder: Path, key: str) -> "CLIPTokenizer":
    from transformers import CLIPTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{key}: {folder} holds no tokenizer (tokenizer.json, or vocab.json and merges.txt)")
    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # its files may say anything, and tokenizers raises plain exceptions
        raise UserError(f"{key}: the tokenizer in {folder} cannot be read: {shortened(str(error))}") from None


def public_tokenizer(pad_token: str = "<|endoftext|>") -> "CLIPTokenizer":
    """The tokenizer of the public CLIP models, whose vocabulary comes with open_clip.

    pad_token: what texts are padded with; `!` (id 0) in SDXL's second encoder.
    """
    from families.common.transformers_text import byte_pair_tokenizer

    return byte_pair_tokenizer(LENGTH, pad_token)


def _tower(file: Path, key: str) -> "tuple[dict[str, Any], PreTrainedTokenizerBase, Callable] | None":
    """Config, tokenizer and weights of a text tower's file, as transformers has them; None of another file.

    Raises:
        UserError: it is damaged.
    """
    from families.common import transformers_text

    try:
        if read_settings(file) is None:
            return None
        tower = text_tower(path=file)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
    model = transformers_text.text_encoder(tower)
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return config, transformers_text.tokenizer(tower), model.state_dict


def _own_name(name: str, own: Sequence[str]) -> str:
    """transformers 5 dropped the prefix `text_model.` of CLIPTextModel, which published files have."""
    bare = name.removeprefix("text_model.")
    return bare if name not in own and (bare in own or bare.endswith("position_ids")) else name


def _make_positions(model: nn.Module) -> None:
    """Buffers that no file holds, which a network from the meta device does not have yet."""
    for module in model.modules():
        if "position_ids" in module._non_persistent_buffers_set:
            module.position_ids = torch.arange(module.position_ids.shape[-1]).expand(1, -1)
