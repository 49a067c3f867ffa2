"""Downloads the official weights into this folder; an interrupted download goes on where it stopped.

    python3 models/download.py essential big-big bfloat16

essential: what every use case needs (encoder of Stage C's latents, its previewer, Stage A).
big-big, big-small, small-big, small-small: Stage B and Stage C (in this order), the large or the small version.
controlnet: the ControlNets for the large Stage C (canny, inpainting, super_resolution).
example-dataset: fernando.tar, pictures of a dog, for the LoRA example of the training guide.
bfloat16 (default) or float32: the type of Stage B's and C's weights.

HF_ENDPOINT chooses a mirror, HF_TOKEN or `hf auth login` an account. Files are checked against the hub's size and
SHA-256.
"""

import argparse
import sys
from pathlib import Path

from families.common.hub import DownloadError, check_space, difference, fetch, look_up

WEIGHTS, EXAMPLES = "stabilityai/stable-cascade", "dome272/stable-cascade"
VARIANTS = {
    f"{stage_b}-{stage_c}": [
        f"stage_b{'' if stage_b == 'big' else '_lite'}{{dtype}}.safetensors",
        f"stage_c{'' if stage_c == 'big' else '_lite'}{{dtype}}.safetensors",
    ]
    for stage_b in ("big", "small")
    for stage_c in ("big", "small")
}
SETS = {
    "essential": ["effnet_encoder.safetensors", "previewer.safetensors", "stage_a.safetensors"],
    **VARIANTS,
    "controlnet": [f"controlnet/{name}.safetensors" for name in ("canny", "inpainting", "super_resolution")],
    "example-dataset": ["fernando.tar"],
}
DTYPES = {"bfloat16": "_bf16", "bf16": "_bf16", "float32": "", "fp32": ""}


def choose(words: list[str]) -> list[tuple[str, str]]:
    """(repository, path) of each file that the words of the command line name.

    Raises:
        DownloadError: a word is unknown, or none names a set.
    """
    unknown = [word for word in words if word not in SETS and word not in DTYPES]
    if unknown or not any(word in SETS for word in words):
        problem = f"{unknown[0]!r} is unknown" if unknown else "nothing to download is named"
        raise DownloadError(f"{problem}; write any of {', '.join(SETS)}, and at most one of {', '.join(DTYPES)}")
    suffixes = {DTYPES[word] for word in words if word in DTYPES} or {"_bf16"}
    if len(suffixes) > 1:
        raise DownloadError("bfloat16 and float32 are both named; write one of them")
    (suffix,) = suffixes
    named = [
        (EXAMPLES if word == "example-dataset" else WEIGHTS, path.format(dtype=suffix))
        for word in words
        for path in SETS.get(word, [])
    ]
    return list(dict.fromkeys(named))


def download(words: list[str], folder: Path, dry_run: bool = False) -> None:
    """Downloads what the words name into `folder`, or only lists it.

    Raises:
        DownloadError: see `choose`, `look_up` and `fetch`; or a local file of that name is another one.
    """
    files = [look_up(*named) for named in choose(words)]
    missing = [file for file in files if not (folder / file.name).exists()]
    for file in files:
        state = "to download" if file in missing else "here"
        print(f"{file.size_bytes / 1e6:>10,.1f} MB  {file.name:<32} {state}")
    if dry_run:
        return
    for file in files:
        problem = None if file in missing else difference(folder / file.name, file)
        if problem:
            raise DownloadError(
                f"{folder / file.name} is not the hub's ({problem}); move or delete it and run the same command again"
            )
    check_space(missing, folder)
    for file in missing:
        print(f"{fetch(file, folder)}: complete, size and hash are right", flush=True)


def _folder(text: str) -> Path:
    return Path(text).expanduser()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="SET", help=f"{', '.join(SETS)}; and {', '.join(DTYPES)}")
    parser.add_argument("--folder", type=_folder, default=Path(__file__).resolve().parent, help="default: models/")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, download nothing")
    options = parser.parse_args(arguments)
    try:
        download(options.words, options.folder, options.dry_run)
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command to go on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
