"""Folders that look as a run leaves them, written in a moment."""

import json
from pathlib import Path

import numpy as np

from warpcore.evaluation import sheet
from warpcore.pictures import cells_metadata, save_png
from warpcore.results import Sampled


def lines(updates: int, first: int = 1, loss: float = 1.0) -> list[dict]:
    """Of metrics, a report every 10 updates."""
    return [
        {
            "update": update, "samples_hash": f"{update:016x}", "loss": loss / update, "lr": 1e-4,
            "samples_seen": 4 * update, "samples_per_second": 8.0 + (update - 1) // 10,
        }
        for update in range(first, updates + 1)
    ]  # fmt: skip


def write_lines(path: Path, written: list[dict], mode: str = "w") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, mode, encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in written)


def make_run(
    folder: Path, made: int = 20, of: int = 20, notes: list[dict] | None = None, samples: dict | None = None, **config
) -> Path:
    """samples: by update the prompts and the grey of their pictures, which the average has 9 brighter."""
    write_lines(folder / "metrics.jsonl", lines(made))
    settings = {"experiment_id": folder.name, "updates": of, "lr": 0.001, "batch_size": 4} | config
    (folder / "config.yaml").write_text(json.dumps(settings), encoding="utf-8")
    info = {"update": made, "updates": of, "run_id": "x", "bad_samples": 3}
    (folder / "info.json").write_text(json.dumps(info), encoding="utf-8")
    if notes is not None:
        write_lines(folder / "notes.jsonl", notes)
    for update, prompts in (samples or {}).items():
        rows = [Sampled(prompt, {"drawn": grey(of), "drawn (EMA)": grey(of + 9)}) for prompt, of in prompts.items()]
        picture, cells = sheet(rows)
        save_png(folder / "samples" / f"{update:08d}.png", picture, cells_metadata(cells))
    return folder


def grey(value: int) -> np.ndarray:
    return np.full((16, 16, 3), value, np.uint8)
