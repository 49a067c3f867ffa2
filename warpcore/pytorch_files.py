"""Weights in PyTorch's own format (`.pt`), written tensor by tensor: `torch.save` needs all of them in memory."""

import io
import pickle
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warpcore.files import disk_error, naming, open_plain, replacing
from warpcore.weights import stored_dtype


@dataclass(frozen=True)
class _Storage:
    """The numbers of a tensor, which a record of the file has."""

    record: str
    dtype: torch.dtype
    count: int


class _Pickler(pickle.Pickler):
    """Pickles shapes as `torch.save` does tensors; each has a storage of its own."""

    def __init__(self, file: io.BytesIO, dtypes: Sequence[torch.dtype]):
        super().__init__(file, protocol=2)
        self.dtypes, self.count = dtypes, 0

    def reducer_override(self, thing: Any) -> Any:
        if not isinstance(thing, Tensor):
            return NotImplemented
        storage = _Storage(str(self.count), self.dtypes[self.count], thing.numel())
        self.count += 1
        strides = torch.empty(thing.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (storage, 0, tuple(thing.shape), strides, False, OrderedDict())

    def persistent_id(self, thing: Any) -> Any:
        if not isinstance(thing, _Storage):
            return None
        kind = torch.storage._dtype_to_storage_type_map()[thing.dtype]
        return "storage", getattr(torch, kind), thing.record, "cpu", thing.count


def write_pytorch_file(
    path: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
    unchanged: Collection[str] = (),
    under: str | None = None,
) -> None:
    """Write a file that `torch.load` reads, and that appears whole; of what is converted, memory holds one tensor.

    dtype: of floating-point tensors but for those named `unchanged`; by default they stay as they are.
    under: the key of the file's mapping that holds the tensors; by default they are the mapping.
    """
    partial = path.with_suffix(".partial")
    dtypes = [stored_dtype(tensor, None if name in unchanged else dtype) for name, tensor in tensors.items()]
    table = io.BytesIO()
    _Pickler(table, dtypes).dump(dict(tensors) if under is None else {under: dict(tensors)})
    with replacing(path, partial), naming(partial), _archive(partial) as archive:
        archive.write_record("data.pkl", table.getvalue(), len(table.getvalue()))
        for number, (kind, tensor) in enumerate(zip(dtypes, tensors.values(), strict=True)):
            own = tensor.detach().to("cpu", kind).contiguous()
            own = own.clone() if own.storage_offset() else own  # a record begins where its storage does
            archive.write_record(f"data/{number}", own.untyped_storage(), own.nbytes)


@contextmanager
def _archive(path: Path) -> Iterator[Any]:
    """PyTorch's writer of a file, whose errors are those of the disk, where it refused a part."""
    try:
        with open_plain(path, "wb") as file, torch.serialization._open_zipfile_writer(file) as archive:
            yield archive
    except RuntimeError as error:
        raise disk_error(error) from None
