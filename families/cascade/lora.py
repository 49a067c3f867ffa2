"""LoRA and trained tokens on the networks of the cascade: for training, and from files for drawing."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from families.cascade.config import ModelSettings
from families.cascade.inference import warn_of_contradictions
from families.cascade.lora_files import missing_tokens, read_lora
from families.common import precision
from families.common.lora import LoraError, adapters_of, add_adapters, fill, parse_lora
from families.common.lora_formats import Lora, LoraFileError
from families.common.precision import Precision
from families.common.weight_files import weights_in
from modules.clip import TextTower
from modules.lora import EVERY_LAYER, LoraSettings, adapters, places
from modules.stage_c import StageC
from modules.tokens import Token, TokenRows, attach, find_tokens, is_new
from warpcore.processes import Processes

NAMES_WITH_A_DOT = r"\."
"""The filter for all layers but those beside the network's blocks: what the filter '.' found in older versions."""

logger = logging.getLogger(__name__)


def freeze(network: nn.Module, weights: Precision | torch.dtype, processes: Processes) -> None:
    """Freeze a network whose adapters will be trained, in a dtype or, on the device, in four bits (`nf4`)."""
    if weights == "nf4" and (processes.count > 1 or processes.mesh is not None):
        raise LoraError("frozen_weights: nf4 cannot be sharded: over processes, or to offload it, write bfloat16")
    precision.freeze(network, weights, "frozen_weights", processes.device)


def adapt(
    network: nn.Module, filters: Sequence[str], settings: LoraSettings, checkpoint: Collection[str] | None = None
) -> None:
    """Put adapters at the places of a network that `module_filters` find.

    checkpoint: names of the tensors that a run goes on with. A run that began when the filter '.' did not find the
    layers whose names have no dot keeps its layers.
    """
    if checkpoint is not None and EVERY_LAYER in filters and not _adapts_names_without_a_dot(network, checkpoint):
        filters = [NAMES_WITH_A_DOT if text == EVERY_LAYER else text for text in filters]
    add_adapters(network, filters, settings)


def _adapts_names_without_a_dot(network: nn.Module, checkpoint: Collection[str]) -> bool:
    names = tuple(f".{name}.lora." for name in places(network) if "." not in name)
    return any(part in stored for stored in checkpoint for part in names)


def train_tokens(tower: TextTower, entries: Sequence[tuple[str, str | None]]) -> TokenRows:
    """The rows of the tokens that `train_tokens` names, which the tower reads from now on."""
    try:
        rows = TokenRows.of(tower, find_tokens(tower.tokenizer, entries))
    except ValueError as error:
        raise LoraError(f"train_tokens: {error}") from None
    attach(tower, rows)
    return rows


def lora_tensors(network: nn.Module, rows: TokenRows | None) -> dict[str, Tensor]:
    """What our LoRA file holds of a network being trained; sharded tensors stay sharded."""
    tensors = {name: tensor for name, tensor in network.state_dict().items() if ".lora." in name}
    return tensors | ({f"tokens.{name}": tensor for name, tensor in rows.state_dict().items()} if rows else {})


def lora_of(network: nn.Module, rows: TokenRows | None = None) -> Lora:
    """The adapters in a network and the rows of tokens, as a file would hold them."""
    found = adapters_of(network)
    if rows is None:
        return Lora(found)
    return Lora(found, [token.name for token in rows.tokens], rows.initial, rows.delta.detach())


@torch.no_grad()
def load_into(network: nn.Module, rows: TokenRows | None, path: Path, filters: Sequence[str]) -> None:
    """Start the adapters and tokens of a training from those of a file, which have to be the same ones.

    The adapters change the network as those of the file do, whatever the alphas of the two are.

    Raises:
        LoraFileError: they are others, or of another rank.
    """
    lora = read_lora(path, network, filters, rows)
    there = {name: adapter for name, _, adapter in adapters(network)}
    tokens = [token.name for token in rows.tokens] if rows else []
    differing = sorted(there.keys() ^ lora.adapters.keys()) + sorted(set(tokens) ^ set(lora.tokens))
    if differing:
        where = "only in the file" if differing[0] in {*lora.adapters, *lora.tokens} else "not in the file"
        raise LoraFileError(
            f"{path} does not hold what this run trains: {differing[0]} is {where}{_hint(differing, there)}"
        )
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


def _hint(differing: Sequence[str], there: Collection[str]) -> str:
    """What to write where a file is from before the filter '.' found the layers whose names have no dot, too."""
    if any("." in name or name not in there for name in differing):
        return ""
    return f". Write module_filters: ['{NAMES_WITH_A_DOT}'] to leave out {', '.join(differing)}"


@torch.no_grad()
def add_tokens(tower: TextTower, loras: Sequence[tuple[Lora, float]]) -> None:
    """Let a tower read the tokens of LoRAs, each trained as far as its LoRA's strength.

    Raises:
        LoraFileError: they are for a tower of another width or vocabulary, or two LoRAs have a token in common.
    """
    for lora, strength in loras:
        if not lora.tokens:
            continue
        width = lora.token_initial.shape[1]
        if width != tower.width:
            raise LoraFileError(f"tokens {', '.join(lora.tokens)} are {width} wide, this text tower is {tower.width}")
        rows = TokenRows(_tokens_here(tower, lora.tokens), lora.token_initial)
        rows.delta.copy_(lora.token_delta * strength)
        attach(tower, rows.requires_grad_(False).to(tower.model.positional_embedding.device))


def _tokens_here(tower: TextTower, names: Sequence[str]) -> list[Token]:
    vocabulary, tokens, next_id = tower.tokenizer.vocabulary, [], tower.tokenizer.vocab_size
    for name in names:
        if is_new(name) == (name.lower() in vocabulary):
            problem = "is in two of the LoRAs" if is_new(name) else "is not in this text tower's vocabulary"
            raise LoraFileError(f"the token {name} {problem}")
        tokens.append(Token(name, next_id if is_new(name) else vocabulary[name], ()))
        next_id += is_new(name)
    return tokens


def open_loras(files: Sequence[str], settings: ModelSettings, use_ema: bool = True) -> list[tuple[Lora, float]]:
    """Read LoRAs, written as FILE[:STRENGTH], for the Stage C that the settings name.

    A FILE may be the folder of a training run; use_ema takes its averaged weights, where there are some.

    Raises:
        LoraFileError: a file is missing or made for another network.
    """
    if not files:
        return []
    network = outline(settings)
    found = [(weights_in(place, "lora", use_ema), strength) for place, strength in map(parse_lora, files)]
    for path, _ in found:
        warn_of_contradictions(path, settings)
    opened = [(read_lora(path, network), strength) for path, strength in found]
    known = {token for lora, _ in opened for token in lora.tokens}
    for (lora, _), file in zip(opened, files, strict=True):
        if not known.issuperset(lora.missing_tokens):
            logger.warning("%s: %s. Add the embeddings to `lora`", file, missing_tokens(lora))
    return opened


def outline(settings: ModelSettings) -> StageC:
    """Stage C without weights, which says what its layers are called and how large they are."""
    with torch.device("meta"):
        return StageC(**settings.version.stage_c)
