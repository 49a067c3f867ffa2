"""LoRA and trained tokens in a training, for any network and any text encoder."""

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from families.common import precision
from families.common.frozen_base import FrozenBase
from families.common.lora import LoraError, adapters_of, fill
from families.common.lora_config import LoraKeys
from families.common.lora_formats import Lora, LoraFileError
from modules.lora import adapters
from modules.tokens import TextEncoder, Token, TokenRows, attach, find_tokens, is_new
from warpcore.errors import UserError
from warpcore.patterns import searching
from warpcore.processes import Processes

logger = logging.getLogger(__name__)


class DrawnWithoutLora(FrozenBase):
    """Draws samples without and with the LoRA that is trained; named before the class that draws them."""

    def without_lora(self) -> AbstractContextManager:
        """Within it, the networks are as they were before the LoRA."""
        raise NotImplementedError

    def draw(self, prompts: list[str], size: tuple[int, ...], *told: Any) -> dict[str, np.ndarray]:
        """Two columns of drawings, uint8 (B, H, W, 3), from the same noise; of clips with their frames."""
        with self.without_lora():
            (base,) = super().draw(prompts, size, *told).values()
        (own,) = super().draw(prompts, size, *told).values()
        return {"base": base, "LoRA": own}


def freeze(network: nn.Module, config: LoraKeys, dtype: torch.dtype, processes: Processes) -> None:
    """Freeze a network whose adapters will be trained: in `frozen_weights`, or else in a dtype.

    Weights are packed into eight or four bits on the device, but for a network that may be too large for it.
    """
    weights = config.frozen_weights or dtype
    if weights == "nf4" and (processes.count > 1 or processes.mesh is not None):
        raise LoraError(
            "frozen_weights: nf4 cannot be sharded: over processes, or to offload it, write bfloat16 or float8_e4m3fn"
        )
    device = "cpu" if config.swap_blocks else processes.device
    precision.freeze(network, weights, "frozen_weights", device, processes.device)


def train_tokens(encoder: TextEncoder, entries: Sequence[tuple[str, str | None]]) -> TokenRows:
    """The rows of the tokens that `train_tokens` names, which the text encoder reads from now on."""
    try:
        with searching("train_tokens"):
            tokens = find_tokens(encoder, entries)
    except UserError:
        raise
    except ValueError as error:
        raise LoraError(f"train_tokens: {error}") from None
    rows = TokenRows.of(encoder, tokens)
    attach(encoder, rows)
    return rows


def lora_tensors(network: nn.Module, rows: TokenRows | None) -> dict[str, Tensor]:
    """What our LoRA file holds of a network being trained; sharded tensors stay sharded."""
    tensors = {name: tensor for name, tensor in network.state_dict().items() if ".lora." in name}
    return tensors | ({f"tokens.{name}": tensor for name, tensor in rows.state_dict().items()} if rows else {})


def lora_of(network: nn.Module, rows: TokenRows | None = None) -> Lora:
    """The adapters in a network and the rows of tokens, as a file would hold them."""
    ranks = (adapter.settings.min_rank for _, _, adapter in adapters(network))
    lora = Lora(adapters_of(network), min_rank=next(ranks, None))
    if rows is None:
        return lora
    return lora.with_tokens([token.name for token in rows.tokens], rows.initial, rows.delta.detach())


@torch.no_grad()
def start_from(lora: Lora, network: nn.Module, rows: TokenRows | None, path: Path) -> None:
    """Start the adapters of a network and tokens from those of a file, which have to be the same ones.

    The adapters change the network as those of the file do, whatever the alphas of the two are.

    Raises:
        LoraFileError: they are others, or of another rank.
    """
    there = {name: adapter for name, _, adapter in adapters(network)}
    tokens = [token.name for token in rows.tokens] if rows else []
    if differing := differences(lora, there, tokens):
        where = "only in the file" if differing[0] in {*lora.adapters, *lora.tokens} else "not in the file"
        raise LoraFileError(f"{path} does not hold what this run trains: {differing[0]} is {where}")
    if lora.missing_tokens:
        logger.warning("lora_checkpoint_path %s: %s", path, missing_tokens(lora))
    for name, adapter in there.items():
        try:
            fill(adapter, lora.adapters[name])
        except ValueError as error:
            raise LoraFileError(f"{path}: {name}: {error}") from None
    for i, token in enumerate(tokens):
        place = lora.tokens.index(token)
        rows.initial[i], rows.delta[i] = lora.token_initial[place], lora.token_delta[place]


def differences(lora: Lora, there: Mapping[str, nn.Module], tokens: Sequence[str]) -> list[str]:
    """Layers and tokens that only one of a file and a run has."""
    return sorted(there.keys() ^ lora.adapters.keys()) + sorted({*tokens} ^ {*lora.tokens})


def warn_of_missing_tokens(files: Sequence[str], loras: Sequence[Collection[Lora]]) -> None:
    """Log which LoRAs, read together, lack tokens that none of them has.

    loras: what each of the files holds.
    """
    known = {token for own in loras for lora in own for token in lora.tokens}
    for file, own in zip(files, loras, strict=True):
        for lora in own:
            if not known.issuperset(lora.missing_tokens):
                logger.warning("%s: %s. Add the embeddings to `lora`", file, missing_tokens(lora))


def missing_tokens(lora: Lora) -> str:
    """A warning that a LoRA lacks tokens that it was trained with."""
    named = ", ".join(lora.missing_tokens)
    return f"The LoRA was trained with the tokens {named}, which are neither in its file nor in embeddings beside it"


@torch.no_grad()
def add_tokens(encoder: TextEncoder, loras: Sequence[tuple[Lora, float]]) -> None:
    """Let a text encoder read the tokens of LoRAs, each trained as far as its LoRA's strength.

    Raises:
        LoraFileError: they are for an encoder of another width or vocabulary, or two LoRAs have a token in common.
    """
    for lora, strength in loras:
        if not lora.tokens:
            continue
        width = lora.token_initial.shape[1]
        if width != encoder.width:
            raise LoraFileError(
                f"tokens {', '.join(lora.tokens)} are {width} wide, this text tower is {encoder.width}"
            )
        rows = TokenRows(_tokens_here(encoder, lora.tokens), lora.token_initial)
        rows.delta.copy_(lora.token_delta * strength)
        attach(encoder, rows.requires_grad_(False).to(next(encoder.token_embedding.parameters()).device))


def _tokens_here(encoder: TextEncoder, names: Sequence[str]) -> list[Token]:
    vocabulary, tokens, next_id = encoder.vocabulary, [], encoder.vocab_size
    for name in names:
        if is_new(name) == (name.lower() in vocabulary):
            problem = "is in two of the LoRAs" if is_new(name) else "is not in this text tower's vocabulary"
            raise LoraFileError(f"the token {name} {problem}")
        tokens.append(Token(name, next_id if is_new(name) else vocabulary[name], ()))
        next_id += is_new(name)
    return tokens
