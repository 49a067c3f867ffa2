"""Write a weights file in another precision; names, shapes and what the file says about itself stay.

python3 tools/convert_weights.py runs/my_run/generator_ema.safetensors stage_c_bf16.safetensors --dtype bfloat16
"""

import argparse
from pathlib import Path

import torch
from safetensors import SafetensorError

from modules.safetensors_files import open_weights
from tools.arguments import local_path
from warpcore.errors import UserError, run_script
from warpcore.files import why_no_file
from warpcore.outputs import check_new
from warpcore.weights import converted, dtype_name, write_weights


def convert(source: Path, target: Path, dtype: torch.dtype, overwrite: bool = False) -> None:
    """Write `target`, where nothing is yet unless `overwrite` is given.

    Raises:
        UserError: `source` is missing or no safetensors file, `target` is there already, or a number is too large.
    """
    if problem := why_no_file(source):
        raise UserError(f"{source} {problem}")
    check_new([target], "name another file, or give --overwrite", overwrite)
    try:
        with open_weights(source) as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    except (SafetensorError, RuntimeError, TypeError, AttributeError) as error:  # such as a dtype of the future
        raise UserError(f"{source} is no whole safetensors file: {error}") from None
    tensors = converted(tensors, dtype)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_weights(target, tensors, (metadata or {}) | {"dtype": dtype_name(tensors)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=local_path)
    parser.add_argument("target", type=local_path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET where it is there already")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.target, getattr(torch, arguments.dtype), arguments.overwrite)
    print(f"{arguments.target}: {arguments.target.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_script(main)
