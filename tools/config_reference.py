"""Write the configuration tables of the README from the config classes, so that they cannot go stale.

python3 tools/config_reference.py README.md
"""

import sys
from pathlib import Path

from cascade.config import CascadeConfig, ModelSettings
from warpcore.config import Config, describe

START, END = "<!-- config reference: made by tools/config_reference.py -->", "<!-- end of config reference -->"


def main() -> None:
    readme = Path(sys.argv[1])
    readme.write_text(with_reference(readme.read_text()))


def with_reference(text: str) -> str:
    """`text` with everything between the two marks replaced by the current tables."""
    before, rest = text.split(START)
    _, after = rest.split(END)
    engine = _table(describe(Config))
    known = {row[0] for row in describe(Config)}
    model = _table(describe(ModelSettings))
    known |= {row[0] for row in describe(ModelSettings)}
    cascade = _table([row for row in describe(CascadeConfig) if row[0] not in known])
    parts = [
        "#### Every training script", engine, "#### Networks", model, "#### Training the cascade", cascade,
    ]  # fmt: skip
    return before + START + "\n" + "\n\n".join(parts) + "\n" + END + after


def _table(rows: list[tuple[str, str, str, str]]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, kind, default, text in rows:
        default = default.removeprefix(", ").removeprefix("default ")
        cells = (f"`{name}`", kind, f"`{default}`" if default != "required" else default, text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
