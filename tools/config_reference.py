"""Write the configuration tables of the README from the config classes, so that they cannot go stale.

python3 tools/config_reference.py README.md
"""

import sys
from importlib import import_module
from pathlib import Path

from families.cascade.config import DiffusionConfig, ModelSettings, StageCConfig
from warpcore.config import Config, Settings
from warpcore.errors import UserError, run_script
from warpcore.keys import describe

START, END = "<!-- config reference: made by tools/config_reference.py -->", "<!-- end of config reference -->"
SCRIPTS = {
    "train/train_c_lora.py": "LoraConfig",
    "train/train_c_controlnet.py": "ControlNetConfig",
    "train/train_b.py": "StageBConfig",
    "train/train_a.py": "StageAConfig",
    "train/train_encoder.py": "EncoderConfig",
    "train/train_towers.py": "TowersConfig",
    "inference/text_to_image.py": "TextToImageConfig",
    "inference/reconstruct.py": "ReconstructConfig",
}


def main() -> None:
    readme = Path(sys.argv[1])
    readme.write_text(with_reference(readme.read_text(encoding="utf-8")), encoding="utf-8")


def with_reference(text: str) -> str:
    """`text` with everything between the two marks replaced by the current tables."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise UserError(f"no place for the tables: write the two lines {START} and {END} where they belong")
    parts = ["#### Every training script", _table(Config), "#### Networks", _table(ModelSettings)]
    parts += ["#### Stage B and Stage C", _table(DiffusionConfig, Config, ModelSettings)]
    parts += ["#### `train/train_c.py`", _table(StageCConfig, DiffusionConfig)]
    for script, name in SCRIPTS.items():
        kind = getattr(import_module(script.removesuffix(".py").replace("/", ".")), name)
        parts += [f"#### `{script}`", _table(kind, Config, ModelSettings, DiffusionConfig, StageCConfig)]
    return before + START + "\n" + "\n\n".join(parts) + "\n" + END + after


def _table(kind: type[Settings], *without: type[Settings]) -> str:
    """The keys of `kind` that stand in none of `without`."""
    known = {name for other in without if issubclass(kind, other) for name in other.model_fields}
    rows = [row for row in describe(kind) if row[0] not in known]
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, kind, default, text in rows:
        default = default.removeprefix(", ").removeprefix("default ")
        cells = (f"`{name}`", kind, f"`{default}`" if default != "required" else default, text)
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
