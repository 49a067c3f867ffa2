"""Where inference scripts find a denoiser, its autoencoder and its text encoder: in runs, or where keys say."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from families.common.inference import read_run, runs_of
from families.common.weight_files import AUTOENCODER, GENERATOR, TEXT
from families.common.weight_source import given_weights, local_weights
from warpcore.config import Settings
from warpcore.keys import weights_keys

_COMPONENTS = {AUTOENCODER: "vae", TEXT: "text_encoder"}
"""What the networks beside a denoiser are called in a pipeline of diffusers."""


def settings_of_run(
    folder: Path,
    kind: type[Settings],
    exported: Mapping[str, str],
    beside: Callable[[Path, str, str], Path | None] = lambda *_: None,
    use_ema: bool = True,
) -> dict[str, Any]:
    """The keys that say what a training run made, and of which networks; `lora` is a list.

    Args:
        kind: has the keys that are taken out of the run's config.
        exported: what runs export, and the key that takes each.
        beside: where the `vae` or the `text_encoder` of a place with a denoiser is, if there is one; it gets the key
            that named the network; by default nothing is.

    Raises:
        ValueError: it is not a run's folder, or holds no weights yet.
    """
    of_run, trained = read_run(folder, exported, use_ema)
    kept = {key: of_run[key] for key in kind.model_fields if of_run.get(key) is not None}
    # What stood beside the denoiser that the run began with, stays beside the one that it trained.
    if (base := kept.get(GENERATOR)) is not None:
        place = local_weights(Path(base), GENERATOR)
        for key, component in _COMPONENTS.items():
            if key not in kept and (found := beside(place, component, key)) is not None:
                kept[key] = str(found)
    kept |= {exported[name]: str(file) for name, file in trained.items() if name != "lora"}
    return kept | ({"lora": [str(trained["lora"])]} if "lora" in trained else {})


def with_runs(
    kind: type[Settings], values: Mapping[str, Any], of_run: Callable[[Path, bool], dict[str, Any]]
) -> dict[str, Any]:
    """Values of a config before they are checked: what is not given comes from the runs, the last one first, and
    weights are local paths.

    of_run: see `settings_of_run`.
    """
    runs, folders = runs_of(values)
    use_ema = values.get("use_ema", True)
    found: dict[str, Any] = {}
    loras: list[str] = []
    for folder in folders:
        one = of_run(folder, use_ema)
        loras += one.pop("lora", [])
        found |= one
    given = dict(values)
    if loras:
        listed = given.get("lora") or []
        given["lora"] = loras + (listed if isinstance(listed, list) else [listed])
    if given.get(GENERATOR):  # another denoiser than that of the run says itself what it is
        found = {key: value for key, value in found.items() if key in _COMPONENTS}
    merged = found | given | {"run": runs}
    for key in weights_keys(kind):
        if merged.get(key) and isinstance(merged[key], str | Path):
            merged[key] = given_weights(Path(merged[key]), key, use_ema)
    return merged
