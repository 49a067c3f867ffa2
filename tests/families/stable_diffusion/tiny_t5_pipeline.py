"""Tiny pipelines with T5, laid out as published ones are: random weights, and Python code that must not be run."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from families.common.text_conditions import TextConditions
from families.stable_diffusion.t5_layers import Projection, T5Texts
from tests.families.common import tiny_t5
from tests.families.stable_diffusion.tiny_pipeline import write_sd15, write_sdxl

WIDTH = 16
"""Of T5's states."""
SCALE = 1.5
TEXT_WIDTH = {"sd15": 16, "sdxl": 40}
POOLED_WIDTH = 20


def write_t5_pipeline(folder: Path, version: str, tokens: int = 12, **scheduler) -> Path:
    """A pipeline with T5 of width 16 in `folder`, which is returned; texts are padded to `tokens`."""
    write = write_sd15 if version == "sd15" else write_sdxl
    write(folder, **scheduler)
    for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        shutil.rmtree(folder / name, ignore_errors=True)
    t5 = "text_encoder" if version == "sd15" else "t5_encoder"
    tiny_t5.write_t5(folder / t5, width=WIDTH)
    tokenizer = tiny_t5.write_tokenizer(folder / "tokenizer")
    tokenizer.model_max_length = tokens
    tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(7)
    write_projection(folder / "t5_projection", TEXT_WIDTH[version])
    parts = {"t5_projection": ["pipeline", "T5Projection"], t5: ["transformers", "T5EncoderModel"]}
    if version == "sdxl":
        write_projection(folder / "t5_pooled_projection", POOLED_WIDTH, scaling_factor=1.0)
        parts["t5_pooled_projection"] = ["pipeline", "LinearWithDtype"]
    index = json.loads((folder / "model_index.json").read_text())
    for name in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        index.pop(name, None)
    index |= {"_class_name": ["pipeline", "T5Pipeline"], "tokenizer": ["transformers", "T5Tokenizer"], **parts}
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "pipeline.py").write_text("raise SystemExit('code of a model folder was run')\n")
    return folder


def write_projection(folder: Path, width: int, scaling_factor: float = SCALE, **others) -> None:
    """The folder of a linear layer of T5's states."""
    folder.mkdir(exist_ok=True)
    layer = nn.Linear(WIDTH, width)
    config = {"_class_name": "Projection", "_diffusers_version": "0.1", "scaling_factor": scaling_factor} | others
    (folder / "config.json").write_text(json.dumps(config))
    save_file(layer.state_dict(), folder / "diffusion_pytorch_model.safetensors")


def of_layer(weights: dict[str, Tensor]) -> Projection:
    """A projection with these weights."""
    layer = Projection(*reversed(weights["weight"].shape))
    layer.load_state_dict(weights)
    return layer


class GivenStates(nn.Module):
    """In place of T5: gives states (N, D) of each text that are known."""

    tokenizer, key, device = None, "text_encoder", torch.device("cpu")

    def __init__(self, rows: list[Tensor]):
        super().__init__()
        self.rows = rows

    def encode(self, _) -> TextConditions:
        lengths = torch.tensor([len(row) for row in self.rows])
        hidden = nn.utils.rnn.pad_sequence(self.rows, batch_first=True)
        return TextConditions(hidden, None, torch.arange(hidden.shape[1]) < lengths[:, None])


def texts_of(rows: list[Tensor], length: int) -> TextConditions:
    """What the U-Net of 1.5 sees of projected states (N, D) of each text."""
    width = rows[0].shape[1]
    identity = of_layer({"weight": torch.eye(width), "bias": torch.zeros(width)})
    return T5Texts(GivenStates(rows), identity, None, length).encode(None)
