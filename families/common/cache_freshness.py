"""Whether caches are of the present content of the data that they were made from."""

import json
from collections.abc import Collection

import numpy as np

from families.common.cache_records import RECORD_SUFFIX
from warpcore.data.catalog import Catalog
from warpcore.data.sidecars import ABSENT
from warpcore.data.storage import in_parallel, storage_for
from warpcore.errors import UserError

LOOKED_AT_TARS = 256
"""The records of this many tars are read at most, spread over the data set."""


def check_fresh(catalog: Catalog, folders: Collection[str]) -> None:
    """Compare what the tars of caches say of their source with the tars of the data set.

    folders: those of the caches that were made from these data.

    Raises:
        UserError: a tar has other content than its features were made from.
    """
    spread = np.unique(np.linspace(0, len(catalog) - 1, LOOKED_AT_TARS).astype(int)).tolist() if folders else []
    within = tuple(f"{folder}/" for folder in folders)
    shards = [catalog.shard(number) for number in spread]
    pairs = [(shard, tar) for shard in shards for tar in shard.joined if tar.shard.url.startswith(within)]
    sources = in_parallel(_recorded_source, [(tar.shard.url,) for _, tar in pairs])
    for (shard, tar), source in zip(pairs, sources, strict=True):
        if source is not None and source not in ([shard.size_bytes, shard.content], [shard.size_bytes, shard.etag]):
            raise UserError(f"{shard.url} changed since {tar.shard.url} was made from it: {tar.remedy}")


def _recorded_source(url: str) -> list | None:
    """Size and content hash of what a tar of a cache was made from; None where its record is missing."""
    try:
        with storage_for(url).open(f"{url}{RECORD_SUFFIX}") as file:
            return json.loads(file.read())["source"]
    except ABSENT:
        return None
