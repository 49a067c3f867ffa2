"""Files of weights."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from warpcore.files import open_plain


def write_weights(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, with `about` as its metadata, that appears whole and that others may read."""
    partial = path.with_suffix(".partial")
    open_plain(partial, "wb").close()
    mode = partial.stat().st_mode  # what the umask says: safetensors' own files are for their owner only
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, partial, metadata=None if about is None else dict(about))
    except SafetensorError as error:
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(partial)) from error
    partial.chmod(mode)
    os.replace(partial, path)
