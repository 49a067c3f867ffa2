"""Constructor numbers of the published networks of NOVA and of the minis."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from modules.nova import SIZES

MINI = Path(__file__).resolve().parents[2] / "models" / "mini"
"""Where the weights lie that ship."""
EPSILON, FLOW = "epsilon", "rectified_flows"
"""What networks predict: noise, of discrete times (DDPM), or a straight flow."""

PUBLISHED_CLASSES = 1000
"""Of networks that are told classes and do not say how many."""


@dataclass(frozen=True)
class Version:
    """One of the networks."""

    network: Mapping[str, Any]
    """Constructor numbers of `modules.nova.NOVATransformer`."""
    autoencoder: str
    """The autoencoder by default, as a config names it."""
    text_encoder: str
    """The text encoder by default, as a config names it."""
    target: Literal["epsilon", "rectified_flows"] = FLOW
    """What it predicts where nothing else is said."""
    size_px: tuple[int, int] = (1024, 1024)
    """(H, W) of the pictures, or frames, that it was made for."""
    frames: int = 1
    """Of the clips that it was made for; 1 of pictures."""

    @property
    def is_published(self) -> bool:
        return "/" in self.autoencoder and not Path(self.autoencoder).is_absolute()

    @property
    def draws_clips(self) -> bool:
        return self.network["video_base_size"][0] > 1

    @property
    def text_length(self) -> int:
        """L: tokens of a text that the network reads."""
        return self.network["text_token_len"]

    @property
    def text_width(self) -> int:
        """C of the states of a text."""
        return self.network["text_token_dim"]


def _published(name: str, **of_version: Any) -> Version:
    """The version of a name in `SIZES`; its autoencoder and text encoder are in the same folder on the hub."""
    folder = f"BAAI/{name}"
    return Version({"image_dim": 4, "image_stride": 8, "text_token_len": 256, **SIZES[name]}, folder, folder,
                   **of_version)  # fmt: skip


def _mini(stretched: int, autoencoder: str, **of_version: Any) -> Version:
    """Patches of one latent position: what its autoencoder makes is small, and has 16 channels."""
    numbers = {
        "arch": [{"depth": 3, "embed_dim": 128, "num_heads": 4}, {"depth": 6, "embed_dim": 128, "num_heads": 4},
                 {"depth": 3, "embed_dim": 128}],
        "image_dim": 16, "image_stride": 16, "image_base_size": [8, 8], "video_base_size": [stretched, 4, 4],
        "text_token_dim": 64, "text_token_len": 32,
    }  # fmt: skip
    return Version(numbers, str(MINI / autoencoder), str(MINI / "t5.safetensors"), **of_version)


VERSIONS = {
    **{f"d48w{width}-sdxl1024": _published(f"nova-d48w{width}-sdxl1024") for width in (768, 1024, 1536)},
    "d48w1024-sd512": _published("nova-d48w1024-sd512", target=EPSILON, size_px=(512, 512)),
    "d48w1024-osp480": _published("nova-d48w1024-osp480", target=EPSILON, size_px=(480, 768), frames=33),
    "mini": _mini(1, "autoencoder.safetensors", size_px=(128, 128)),
    "mini-video": _mini(5, "video_autoencoder.safetensors", size_px=(64, 64), frames=17),
}
"""By `model_version`: the published ones as they are called on the hub, after `nova-`."""


def version_of(config: Mapping[str, Any]) -> str | None:
    """Which version constructor numbers are of, for pictures of any size; None for another one."""
    return next((name for name, version in VERSIONS.items() if _told(config) == _told(version.network)), None)


def _told(numbers: Mapping[str, Any]) -> list[Any]:
    arch = numbers.get("arch")
    return [list(arch) if isinstance(arch, Sequence) else arch, numbers.get("image_dim", 4), stretched(numbers) > 1]


def of_classes(numbers: Mapping[str, Any], num_classes: int) -> dict[str, Any]:
    """Constructor numbers of a network that is told classes in place of texts."""
    return {name: number for name, number in numbers.items() if not name.startswith("text_token")} | {
        "num_classes": num_classes
    }


def classes_of(numbers: Mapping[str, Any]) -> int | None:
    """Of how many classes constructor numbers are; None where they are of texts."""
    return None if numbers.get("text_token_dim") else numbers.get("num_classes", PUBLISHED_CLASSES)


def stretched(numbers: Mapping[str, Any]) -> int:
    """To how many frames constructor numbers stretch every clip; 1 for a network of pictures."""
    size = numbers.get("video_base_size")
    return size[0] if isinstance(size, Sequence) and size and isinstance(size[0], int) else 1
