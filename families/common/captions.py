"""What a text encoder reads of captions: long ones lose their end, and tokens in none of them learn nothing."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch import Tensor, nn

from modules.tokenizers import Tokenizer
from warpcore.config import Settings
from warpcore.random import SampleRandom
from warpcore.text import shortened

if TYPE_CHECKING:
    from modules.tokens import Token
    from warpcore.core import WarpCore

CLIP_LENGTH = 77
"""Tokens that CLIP's text encoders read, the begin and end tokens included."""
LOOKED_AT = 1024
"""Captions that a run looks at when it starts; all of a smaller data set."""


def captions_kept(random: SampleRandom, dropout: float) -> Tensor:
    """(B,) bool: which samples keep their caption in this draw. Of the share `dropout` it is left out."""
    return random.uniform("caption dropout") >= dropout


def is_cut(tokenizer: Tokenizer, length: int, caption: str) -> bool:
    """Whether a caption loses its end in an encoder that reads `length` tokens, begin and end tokens included."""
    room = length - 2
    # A token stands for at least one byte: most captions need not be taken apart.
    return len(caption.lower().encode()) > room and len(tokenizer.encode(caption)) > room


@runtime_checkable
class ReadsTokens(Protocol):
    """A text encoder that reads `length` tokens of a text, begin and end tokens included. One that lacks these
    attributes, and is not one of `CutsTexts` either, reads all of a text."""

    tokenizer: Tokenizer
    length: int


@runtime_checkable
class CutsTexts(Protocol):
    """A text encoder that says itself which texts have more than the `length` tokens that it reads."""

    length: int

    def are_cut(self, texts: Sequence[str]) -> list[bool]:
        """Whether each text has."""


def are_cut(encoder: nn.Module, captions: Sequence[str]) -> list[bool]:
    """Which captions lose their end in a text encoder."""
    if isinstance(encoder, CutsTexts):
        return encoder.are_cut(captions)
    if not isinstance(encoder, ReadsTokens):
        return [False] * len(captions)
    return [is_cut(encoder.tokenizer, encoder.length, caption) for caption in captions]


def cut_places(encoder: nn.Module, captions: Sequence[str]) -> list[int | None]:
    """How many characters of each caption a text encoder reads; None of one that it reads to its end.

    Found by asking for beginnings of the caption, as tokenizers differ: with one more character, it would be cut.
    """
    places: list[int | None] = [None] * len(captions)
    bounds = {i: (0, len(captions[i])) for i, lost in enumerate(are_cut(encoder, captions)) if lost}
    while bounds:
        middles = {i: (fits + lost) // 2 for i, (fits, lost) in bounds.items()}
        answers = are_cut(encoder, [captions[i][:middle] for i, middle in middles.items()])
        for (i, middle), lost in zip(middles.items(), answers, strict=True):
            fits, cut = bounds[i]
            bounds[i] = (fits, middle) if lost else (middle, cut)
            if bounds[i][1] - bounds[i][0] <= 1:
                places[i] = bounds.pop(i)[0]
    return places


def cut_note(encoder: nn.Module, captions: Sequence[str], what: str) -> list[str]:
    """How many of `what` lose their end in a text encoder, and how many all of their words, if any do."""
    cut = [caption for caption, lost in zip(captions, are_cut(encoder, captions), strict=True) if lost]
    clean, notes = getattr(encoder, "clean", str), []
    if cut:
        notes.append(
            f"{len(cut)} of {len(captions)} {what} are longer than the {encoder.length} tokens that the text encoder "
            f"reads; the rest of each is cut off, as of {cut[0][:60] + '...'!r}"
        )
    if lost := [caption for caption in captions if caption.strip() and not clean(caption)]:
        notes.append(
            f"{len(lost)} of {len(captions)} {what} have no word left after they are cleaned, and are read as empty "
            f"ones, as {shortened(lost[0])!r}; clean_captions: false only puts them in lower case"
        )
    return notes


def say_of_captions(run: "WarpCore") -> None:
    """Say how many captions of a run's data, and which of its `sample_prompts`, its text encoder cuts off.

    A use case may have `texts_of`, from (shard, caption) pairs to the texts that its encoder sees, and `token_notes`,
    which gets those texts.
    """
    seen = run.feed.some_captions(LOOKED_AT)
    tower = run.networks.get("text")
    if tower is None or not run.processes.is_main:
        return
    texts = run.texts_of(seen) if hasattr(run, "texts_of") else [caption for _, caption in seen]
    whole = run.feed.plan.num_rows_on_file <= LOOKED_AT
    what = "captions" if whole else "captions that were looked at"
    notes = cut_note(tower, texts, what)
    notes += cut_note(tower, getattr(run.config, "sample_prompts", []), "sample_prompts")
    notes += run.token_notes(texts, what) if hasattr(run, "token_notes") else []
    for note in notes:
        run.progress.say(note)


def undrawn(config: Settings) -> list[str]:
    """A line about each list of what to draw that is longer than `sample_count`."""
    counts = {key: len(getattr(config, key, [])) for key in ("sample_prompts", "sample_classes")}
    return [f"{key}: the first {config.sample_count} of {count} are drawn (sample_count)"
            for key, count in counts.items() if count > config.sample_count]  # fmt: skip


def unused_tokens(
    tokenizer: Tokenizer,
    entries: Sequence[tuple[str, str | None]],
    tokens: Sequence["Token"],
    texts: Sequence[str],
    what: str,
) -> list[str]:
    """Notes on those entries of `train_tokens` of whose tokens none stands in a text."""
    used = {i for text in texts for i in tokenizer.encode(text)}
    notes = []
    for name, _ in entries:
        own = [token.id for token in tokens if token.name == name]
        own = own or [token.id for token in tokens if re.search(name, token.name)]
        if used.isdisjoint(own):
            notes.append(
                f"train_tokens: {name} stands in none of the {len(texts)} {what}, those of the prior included: it "
                "learns nothing. Write it into captions or caption_templates as it stands here, or leave it out: "
                "train_tokens=null trains no token"
            )
    return notes
