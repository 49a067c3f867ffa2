"""Whose token ids the text conditions of a cache were made with, and whether other ones would be the same."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from families.common.features import Origin
from modules.tokenizers import BytePairTokenizer
from warpcore.data.captions import BadCaption, CaptionGetter
from warpcore.data.catalog import open_catalog
from warpcore.data.columns import column_types
from warpcore.data.selection import Piece, Selection, make_samples
from warpcore.data.shards import resolve_sources
from warpcore.data.storage import read_ranges
from warpcore.errors import UserError

TOKEN_IDS = "token_ids"
"""The setting of a cache that names its tokenizer."""
_BYTE_PAIRS = ("clip", "open_clip")
_PLAIN = re.compile(r"[ !-%'-;=-~]*")
"""Text whose ids are the same in all ways: printable ASCII without `&` and `<`."""

logger = logging.getLogger(__name__)


def with_token_ids(origin: Origin, folder: str, here: Origin, captions_getter: Sequence) -> Origin:
    """The origin of the cache in a folder, with the token ids of a run where all its captions have them either way.

    A cache that names none was made with the ids of open_clip; where that makes no difference, it is written into it.
    """
    wanted = here.settings.get(TOKEN_IDS)
    known = origin.settings.get(TOKEN_IDS, "open_clip")
    if wanted not in _BYTE_PAIRS:  # no text conditions, or a list of words, whose ids have never changed
        return replace(origin, settings=origin.settings | {TOKEN_IDS: wanted})
    if known == wanted or known not in _BYTE_PAIRS:
        return replace(origin, settings=origin.settings | {TOKEN_IDS: known})
    there, ours = BytePairTokenizer(known), BytePairTokenizer(wanted)
    odd = (caption for caption in captions_in(folder, captions_getter) if not _PLAIN.fullmatch(caption))
    differing = next((caption for caption in odd if there.encode(caption) != ours.encode(caption)), None)
    if differing is not None:
        logger.warning("%s: the conditions of the caption %r, for one, were made of other tokens", folder, differing)
        return replace(origin, settings=origin.settings | {TOKEN_IDS: known})
    found = replace(origin, settings=origin.settings | {TOKEN_IDS: wanted})
    if TOKEN_IDS not in origin.settings:
        try:
            found.write(folder)
        except (OSError, UserError) as error:
            logger.warning("%s: its captions are looked at again at the next start: %s", folder, error)
    return found


def captions_in(folder: str, captions_getter: Sequence) -> Iterator[str]:
    """The captions of a folder of tars, given as a complete URL."""
    getter = CaptionGetter.parse(captions_getter)
    catalog = open_catalog(resolve_sources(folder))
    selection = Selection(columns=column_types(catalog, getter.columns), required_columns=getter.columns)
    for number in range(len(catalog)):
        shard, rows = catalog.shard(number), selection.load(catalog, Piece(number, 0, int(catalog.rows[number]))).table
        samples = make_samples(rows, [shard] * len(rows), [0] * len(rows))
        spans = [(place, name, span) for place, one in enumerate(samples) for name, span in one.members.items()
                 if name in getter.members]  # fmt: skip
        contents: list[dict[str, bytes]] = [{} for _ in samples]
        blocks = read_ranges(shard.url, [span for _, _, span in spans], (shard.size_bytes, shard.etag))
        for (place, name, _), content in zip(spans, blocks, strict=True):
            contents[place][name] = content
        for sample, content in zip(samples, contents, strict=True):
            with suppress(BadCaption):  # such a sample is not drawn
                yield getter(content, sample.columns)
