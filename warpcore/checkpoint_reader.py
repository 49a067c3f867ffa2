"""Reading a checkpoint's tensors: the table of contents is read safely, and files are fetched as they are needed."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from warpcore.checkpoint_table import TableError, read_table
from warpcore.places import CheckpointError


class Reader(FileSystemReader):
    """DCP's reader, with the table of contents read safely, and the files that a process needs fetched before."""

    def __init__(self, path: Path, name: str, fetch: Callable[[Sequence[str]], None]):
        super().__init__(path)
        self._name, self._fetch = name, fetch

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        names = sorted({self.storage_data[item.storage_index].relative_path for item in plan.items})
        first = len(names) and (dist.get_rank() if dist.is_initialized() else 0) % len(names)
        self._fetch(names[first:] + names[:first])  # those that need the same ones begin with different ones
        return super().read_data(plan, planner)

    def read_metadata(self, *args, **kwargs) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            metadata = read_table(path)
        except (OSError, TableError) as error:
            raise CheckpointError(f"{self._name} cannot be read: {error}") from error
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata
