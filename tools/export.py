"""Write what was trained for other programs, and read what they wrote.

    python3 tools/export.py diffusers runs/quickstart_c exported
    python3 tools/export.py lora-comfyui runs/dog dog_comfyui.safetensors
    python3 tools/export.py lora dog_comfyui.safetensors dog.safetensors --model_version 1B

Nothing that exists is overwritten. Keys follow as in the scripts, key=value or --key value; --help behind a format, a
source and a target lists them.
"""

import argparse
from pathlib import Path
from textwrap import indent, wrap

from families.common.exports import OTHER_NAME
from families.common.family import ExportFormat
from families.registry import export_format, export_formats, families
from tools.arguments import local_path
from warpcore.errors import UserError, run_script
from warpcore.outputs import all_or_nothing, check_new


def main() -> None:
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\n{formats_text()}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("format", choices=export_formats(), metavar="format")
    parser.add_argument("source", type=local_path)
    parser.add_argument("target", type=local_path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="key=value or --key value")
    given = parser.parse_args()
    if not given.source.exists():
        raise UserError(f"{given.source} does not exist")
    form = export_format(given.format, given.source)
    check_target(form, given.target)
    try:
        with all_or_nothing(given.target):
            form.write(given.source, given.target, given.arguments)
    except ModuleNotFoundError as error:
        raise UserError(f"{form.name} needs {error.name}: pip install {error.name}") from error


def formats_text() -> str:
    """A table of the formats of each family, as text."""
    parts = []
    for family in families():
        if not family.formats:
            continue
        rows = [("FORMAT", "SOURCE", "TARGET"), *((form.name, form.source, form.target) for form in family.formats)]
        wide = [max(len(row[column]) for row in rows) + 2 for column in range(2)]
        lines = [
            line for name, source, target in rows
            for line in wrap(f"{name:{wide[0]}}{source:{wide[1]}}{target}", 119 - 4, subsequent_indent=" " * sum(wide),
                             replace_whitespace=False, drop_whitespace=True)
        ]  # fmt: skip
        parts.append(f"{family.title}:\n\n{indent(chr(10).join(lines), '    ')}\n\n{family.format_notes}")
    return "\n\n".join(parts)


def check_target(form: ExportFormat, target: Path) -> None:
    """Raise UserError for a place that can't be written to; see `check_new` for single files."""
    if form.writes_folder:
        if not target.is_dir():
            check_new([target], OTHER_NAME)
        elif any(target.iterdir()):
            raise UserError(f"{target} is not empty: name another folder")
        return
    if target.suffix not in form.endings:
        named = " or ".join(f"{target}{ending}" for ending in form.endings)
        kinds = " or ".join(ending.removeprefix(".") for ending in form.endings)
        raise UserError(f"{target}: {form.name} writes a {kinds} file: name it {named}")
    check_new([target], OTHER_NAME)


if __name__ == "__main__":
    run_script(main)
