"""Files that exports write: none over another one, and what they say about themselves."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from warpcore.files import write_whole
from warpcore.outputs import check_new
from warpcore.weights import write_weights

Files = dict[Path, tuple[Mapping[str, Tensor], Mapping[str, str]] | str]
"""Files to write: tensors and metadata, or a text."""
OTHER_NAME = "name another file"
"""What to do where a file is there already."""


def write_files(files: Files) -> None:
    """Write files, over what may be there."""
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            write_whole(file, content)
            continue
        tensors, about = content
        write_weights(file, tensors, {"format": "pt"} | dict(about))


def write_new_files(files: Files, notes: Sequence[str] = ()) -> None:
    """Write files that are not there yet, then print their sizes and what to know about them.

    Raises:
        UserError: one of them is there already.
    """
    check_new(files, OTHER_NAME)
    write_files(files)
    print_sizes(files)
    for note in notes:
        print(f"{note}.")


def print_sizes(files: Iterable[Path]) -> None:
    for file in files:
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
