"""Files of weights."""

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from warpcore.files import open_plain


def write_weights(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, with `about` as its metadata, that appears whole and that others may read."""
    partial = path.with_suffix(".partial")
    open_plain(partial, "wb").close()
    mode = partial.stat().st_mode  # what the umask says: safetensors' own files are for their owner only
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, partial, metadata=None if about is None else dict(about))
    partial.chmod(mode)
    os.replace(partial, path)
