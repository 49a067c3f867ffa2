"""Pictures out of a cache: what its latents decode to, to look at; of clips, some frames."""

from itertools import islice
from pathlib import Path

import torch

from families.common.cache import buckets_of
from families.common.features import stored
from families.common.pictures import to_pictures
from families.common.training import DiffusionTraining
from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import open_catalog
from warpcore.data.columns import column_types
from warpcore.data.loader import Loader
from warpcore.data.plan import Plan
from warpcore.data.reader import Reader
from warpcore.data.shards import resolve_sources
from warpcore.errors import UserError
from warpcore.pictures import cells_metadata, grid_and_cells, save_png
from warpcore.text import counted

MAX_COLUMNS = 8
MAX_SAMPLES = 4096
"""In a sheet."""


def write_preview(training: DiffusionTraining, count: int, path: Path) -> list[str]:
    """Decode latents of the cache that the config of a training names, and write a sheet of them, with captions, or
    with the samples' keys where the training has no captions; lines that tell what could not be read, and the file.

    count: samples, each once; all where there are fewer. The seed of the config chooses them.

    Raises:
        UserError: the cache was made with other networks or settings, or none of its samples can be read.
    """
    names = [name for name, feature in training.features.items() if feature.of_picture and training.is_cached(name)]
    decode = training.feature_decoder()
    catalog = open_catalog(resolve_sources(training.config.webdataset_path))
    captions = CaptionGetter.parse(training.config.captions_getter) if training.needs_captions else None
    fields = {key: one for name in names for key, one in training.caches.origins[name].fields([name]).items()}
    plan = Plan(
        catalog,
        micro_batch_size=1,
        buckets=buckets_of(training).drawn_by_row(),
        captions=captions,
        required_members=[field.suffixes for field in fields.values()],
        seed=training.config.seed,
        columns=column_types(catalog, captions.columns if captions else ()),
    )
    reader = Reader(captions=captions, pictures=False, extra=fields)
    shown, told, notes = [], [], []
    with Loader(plan.micro_batches(), reader, num_workers=0, device=training.device) as loader:
        for batch in islice(loader, min(count, plan.num_rows)):  # an epoch draws each row once
            notes += [f"{event.source}: {event.reason}" for event in batch.events]
            if batch.weight:
                with torch.no_grad():
                    features = {name: stored(batch, name).float() for name in names}
                    pictures = decode(features)
                    shown.extend(to_pictures(pictures, batch.size if pictures.dim() == 4 else None))
                told += batch.captions if captions else batch.keys
    if not shown:
        raise UserError(f"none of the {counted(len(notes), 'sample')} could be read; the first one is {notes[0]}")
    sheet, cells = grid_and_cells(shown, MAX_COLUMNS, told)
    save_png(path, sheet, cells_metadata(cells))
    return [*notes, f"{counted(len(shown), 'picture')}: {path}"]
