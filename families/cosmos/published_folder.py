"""Folders as Cosmos-Predict2 is published and as its program trains: where in them the denoiser is."""

from pathlib import Path

from warpcore.text import read_text

LATEST = "latest_checkpoint.txt"
"""Of a training run: the name of its last checkpoint."""
PUBLISHED_FILE = "model.pt"


def published_file(folder: Path) -> Path | None:
    """The weights file of a published folder, or of a published training run, whether or not it is there; None where
    the folder is neither."""
    for run in (folder, folder / "checkpoints"):
        if (run / LATEST).is_file():
            return run / "model" / Path(read_text(run / LATEST).strip()).name
    file = folder / PUBLISHED_FILE
    return file if file.is_file() else None
