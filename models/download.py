"""Downloads the official weights into this folder; an interrupted download goes on where it stopped.

    python3 models/download.py sdxl sdxl-vae
    python3 models/download.py essential big-big bfloat16

Stable Diffusion, each a checkpoint in one file:
sd15: Stable Diffusion 1.5, without the averages that it was trained with. sdxl: SDXL 1.0.
sd15-vae: the autoencoder whose decoder was trained further (sd-vae-ft-mse).
sdxl-vae: SDXL's autoencoder, changed so that it does not overflow in float16 (sdxl-vae-fp16-fix).

Cosmos-Predict2 Text2Image, each with its autoencoder, in a folder of its name:
cosmos-0.6b, cosmos-2b, cosmos-14b; cosmos-0.6b-distilled: the one that draws in 1 to 4 steps.
Their licence has to be accepted on the hub. The text encoder is `google-t5/t5-11b`, which a config can name.

DiT-XL/2 of ImageNet's classes, not for commercial use: dit-256, dit-512. Latte-XL/2, clips of UCF101's classes:
latte-ucf101. PixArt-alpha: pixart-256, pixart-512, pixart-1024-ms.
Open-Sora 1.2: open-sora-v3, the network STDiT3-XL/2, and open-sora-vae, its autoencoder. Open-Sora 1.1:
open-sora-v2, the network STDiT2-XL/2. Open-Sora 1.0: open-sora-v1-256 and open-sora-v1-512, networks STDiT-XL/2.

Stable Cascade:
essential: what every use case needs (encoder of Stage C's latents, its previewer, Stage A).
big-big, big-small, small-big, small-small: Stage B and Stage C (in this order), the large or the small version.
controlnet: the ControlNets for the large Stage C (canny, inpainting, super_resolution).
example-dataset: fernando.tar, pictures of a dog, for the LoRA example of the training guide.
bfloat16 (default) or float32: the type of Stage B's and C's weights.

Folders of diffusers, and NOVA's (docs/nova.md), need no command: their names on the hub can stand in a config.
HF_ENDPOINT chooses a mirror, HF_TOKEN or `hf auth login` an account. Files are checked against the hub's size and
SHA-256, against models/SHA256SUMS, and against what they were when they were first downloaded (.sha256sums in the
folder).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from families.common.hub import (
    DownloadError,
    RemoteFile,
    check_space,
    difference,
    expected_sha256,
    fetch,
    look_up,
    look_up_elsewhere,
)
from tools.arguments import local_path
from warpcore.errors import clear_errors
from warpcore.outputs import check_folder

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
"""Of Stable Cascade, in `WEIGHTS` and `EXAMPLES`."""


STABLE_DIFFUSION = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors"),
    "sd15-vae": ("stabilityai/sd-vae-ft-mse-original", "vae-ft-mse-840000-ema-pruned.safetensors"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors"),
    "sdxl-vae": ("madebyollin/sdxl-vae-fp16-fix", "sdxl_vae.safetensors"),
}
"""Repository and path of each."""
COSMOS = {
    f"cosmos-{name.lower()}": (f"nvidia/Cosmos-Predict2-{name.partition('-')[0]}-Text2Image", file)
    for name, file in {
        "0.6B": "model.pt", "0.6B-distilled": "model_distilled.pt", "2B": "model.pt", "14B": "model.pt",
    }.items()
}  # fmt: skip
"""Repository and denoiser of each. Beside it lies `COSMOS_AUTOENCODER`; both keep their places."""
COSMOS_AUTOENCODER = "tokenizer/tokenizer.pth"
DIT = {f"dit-{size}": ("facebookresearch/DiT", f"DiT-XL-2-{size}x{size}.pt") for size in (256, 512)}
"""Repository and path of each. They are not on the hub, see `ELSEWHERE`."""
LATTE = {"latte-ucf101": ("maxin-cn/Latte", "ucf101.pt")}
"""Repository and path of each."""
OPEN_SORA = {
    "open-sora-v3": ("hpcai-tech/OpenSora-STDiT-v3", "model.safetensors"),
    "open-sora-vae": ("hpcai-tech/OpenSora-VAE-v1.2", "model.safetensors"),
    "open-sora-v2": ("hpcai-tech/OpenSora-STDiT-v2-stage3", "model.safetensors"),
    "open-sora-v1-256": ("hpcai-tech/Open-Sora", "OpenSora-v1-HQ-16x256x256.pth"),
    "open-sora-v1-512": ("hpcai-tech/Open-Sora", "OpenSora-v1-HQ-16x512x512.pth"),
}
"""Repository and path of each."""
LOCAL_NAMES = {
    LATTE["latte-ucf101"]: "Latte-XL-2-256x256-ucf101.pt",
    OPEN_SORA["open-sora-v3"]: "OpenSora-STDiT-v3.safetensors",
    OPEN_SORA["open-sora-vae"]: "OpenSora-VAE-v1.2.safetensors",
    OPEN_SORA["open-sora-v2"]: "OpenSora-STDiT-v2-stage3.safetensors",
}
"""What files are called here whose own names say too little; Open-Sora calls them so, too."""
PIXART = {
    f"pixart-{name.lower()}": ("PixArt-alpha/PixArt-alpha", f"PixArt-XL-2-{size}.pth")
    for name, size in {"256": "256x256", "512": "512x512", "1024-MS": "1024-MS"}.items()
}
"""Repository and path of each."""
ELSEWHERE = {"facebookresearch/DiT": "https://dl.fbaipublicfiles.com/DiT/models/"}
"""By repository: where files are that are not on the hub."""
LICENCES = {
    **{repository: "nvidia-open-model" for repository, _ in COSMOS.values()},
    "facebookresearch/DiT": "non-commercial", WEIGHTS: "non-commercial", EXAMPLES: "unknown",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
    "stabilityai/sd-vae-ft-mse-original": "mit", "madebyollin/sdxl-vae-fp16-fix": "mit",
    "PixArt-alpha/PixArt-alpha": "openrail++", "maxin-cn/Latte": "unknown",
    **{repository: "apache-2.0" for repository, _ in OPEN_SORA.values()},
}  # fmt: skip
"""By repository. All but `non-commercial` allow commercial use; the openrail licences forbid some uses."""
ALL = [*STABLE_DIFFUSION, *COSMOS, *DIT, *LATTE, *PIXART, *OPEN_SORA, *SETS]
"""The sets that may be named."""
DTYPES = {"bfloat16": "_bf16", "bf16": "_bf16", "float32": "", "fp32": ""}


def choose(words: list[str]) -> list[tuple[str, str]]:
    """(repository, path) of each file that the words of the command line name.

    Raises:
        DownloadError: a word is unknown, or none names a set.
    """
    unknown = [word for word in words if word not in ALL and word not in DTYPES]
    if unknown or not any(word in ALL for word in words):
        problem = f"{unknown[0]!r} is unknown" if unknown else "nothing to download is named"
        raise DownloadError(f"{problem}; write any of {', '.join(ALL)}, and at most one of {', '.join(DTYPES)}")
    suffixes = {DTYPES[word] for word in words if word in DTYPES} or {"_bf16"}
    if len(suffixes) > 1:
        raise DownloadError("bfloat16 and float32 are both named; write one of them")
    (suffix,) = suffixes
    single = STABLE_DIFFUSION | DIT | LATTE | PIXART | OPEN_SORA
    named = [single[word] for word in words if word in single]
    named += [
        (COSMOS[word][0], path) for word in words if word in COSMOS for path in (COSMOS[word][1], COSMOS_AUTOENCODER)
    ]
    named += [
        (EXAMPLES if word == "example-dataset" else WEIGHTS, path.format(dtype=suffix))
        for word in words
        for path in SETS.get(word, [])
    ]
    return list(dict.fromkeys(named))


def folder_of(file: RemoteFile, folder: Path) -> Path:
    """Where a file lands: Cosmos' files have the same names in each size, so they keep their folders."""
    if file.repository not in {repository for repository, _ in COSMOS.values()}:
        return folder
    return (folder / file.repository.rpartition("/")[2] / file.path).parent


def download(words: list[str], folder: Path, dry_run: bool = False) -> None:
    """Downloads what the words name into `folder`, or only lists it.

    Raises:
        DownloadError: see `choose`, `look_up`, `expected_sha256` and `fetch`; or a local file of that name
            is another one.
    """
    named = choose(words)
    check_folder(folder, "the files")
    files = [
        look_up_elsewhere(repository, path, ELSEWHERE[repository] + path)
        if repository in ELSEWHERE
        else replace(look_up(repository, path), local_name=LOCAL_NAMES.get((repository, path), ""))
        for repository, path in named
    ]
    targets = {file: folder_of(file, folder) / file.name for file in files}
    missing = [file for file in files if not targets[file].exists()]
    for file in files:
        expected_sha256(file, folder)
        state = "to download" if file in missing else "here"
        name = targets[file].relative_to(folder).as_posix()
        print(f"{file.size_bytes / 1e6:>10,.1f} MB  {name:<40} {LICENCES[file.repository]:<22} {state}")
    if dry_run:
        return
    for file in files:
        problem = None if file in missing else difference(targets[file], file, folder)
        if problem:
            raise DownloadError(
                f"{targets[file]} is not the hub's ({problem}); move or delete it and run the same command again"
            )
    check_space(missing, folder)
    for file in missing:
        known = expected_sha256(file, folder) or file.git_blob
        told = "size and hash are right" if known else "size is right, no hash known; the present one is recorded"
        print(f"{fetch(file, targets[file].parent, folder)}: complete, {told}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "words",
        nargs="+",
        metavar="SET",
        help=f"{', '.join(ALL)}; and {', '.join(DTYPES)}",
    )
    parser.add_argument("--folder", type=local_path, default=Path(__file__).resolve().parent, help="default: models/")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, download nothing")
    options = parser.parse_args(arguments)
    with clear_errors():
        download(options.words, options.folder, options.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
