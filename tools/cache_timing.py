"""How long a run waits for the features of a sample: from pictures, and from a cache."""

import time
from dataclasses import replace

import torch

from families.common.cache_writer import Work
from families.common.features import Origin
from families.common.text_memory import TextMemory
from families.common.training import DiffusionTraining
from warpcore.data.catalog import open_catalog
from warpcore.data.columns import column_types, tensor_types
from warpcore.data.loader import Loader
from warpcore.data.plan import Plan
from warpcore.data.reader import Reader
from warpcore.data.shards import Shard, Source
from warpcore.random import SampleRandom

TIMED_SECONDS = 20
"""Measuring takes no longer than about twice this."""


def seconds_per_sample(
    training: DiffusionTraining, work: Work, reader: Reader, shards: tuple[Shard, Shard], origin: Origin, samples: int
) -> tuple[float, float]:
    """What a run waits for a sample's latents and conditions: from pictures, and from the cache.

    Args:
        reader: of the pictures.
        shards: a tar of pictures, and that of the cache.
        origin: of the cache.
        samples: how many are taken from each.
    """
    fields = origin.fields(training.features) | training.sample_fields(from_cache=True)
    cached = Reader(captions=reader.captions, pictures=False, extra=fields, geometry=training.needs_geometry)
    from_pictures = _seconds(training, work, reader, shards[0], samples)
    training.texts = TextMemory(training.encode_texts, 1 << 30, print)  # as a run from a cache has
    return from_pictures, _seconds(training, work, cached, shards[1], samples)


def _seconds(training: DiffusionTraining, work: Work, reader: Reader, shard: Shard, samples: int) -> float:
    config, names, catalog = training.config, training.index_columns(), open_catalog([Source(1.0, [shard])])
    types = column_types(catalog, names)
    reader = replace(reader, columns=tensor_types(types, names))
    plan = Plan(
        catalog, micro_batch_size=work.batch_size, buckets=work.buckets,
        filters=work.selection.filters, captions=reader.captions,
        required_members=[field.suffixes for field in reader.extra.values()], seed=config.seed,
        columns=types | work.selection.columns,
    )  # fmt: skip
    taken, began = 0, None
    with Loader(plan.micro_batches(), reader, num_workers=config.num_workers, device=training.device) as loader:
        for batch in loader:
            with torch.no_grad(), training.autocast():
                training.encode(batch, SampleRandom(batch.seeds, training.device))
            if training.device.type != "cpu":
                torch.accelerator.synchronize(training.device)
            if began is None:  # workers started, kernels were chosen
                began = time.perf_counter()
                continue
            taken += len(batch.seeds)
            seconds = time.perf_counter() - began
            if taken >= samples or seconds > TIMED_SECONDS:
                return seconds / taken
    raise AssertionError("a plan is endless")
