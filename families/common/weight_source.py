"""Weights as a config names them: a file, a folder as diffusers writes it, or a name on the Hugging Face hub.

    generator_checkpoint_path: models/stage_c_bf16.safetensors
    autoencoder: models/sdxl                                  # a folder, with config.json and safetensors
    generator_checkpoint_path: runs/my_run                    # a training run: what it exported
    autoencoder: madebyollin/sdxl-vae-fp16-fix                # owner/name on the hub
    autoencoder: stabilityai/stable-diffusion-xl-base-1.0/vae # owner/name/subfolder

What is on this machine comes first: only a name with nothing at that path is looked for on the hub. It is downloaded
once, into `models/owner/name/subfolder`, and read from there in every later start, without a network.
"""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TypeVar

from families.common.hub import DownloadError, check_space, difference, fetch, list_files, look_up
from families.common.weight_files import weights_in
from warpcore.config import Settings
from warpcore.errors import UserError
from warpcore.files import open_plain, write_whole
from warpcore.keys import weights_keys
from warpcore.locks import lock_file
from warpcore.meta import are_only_shapes
from warpcore.safe_json import read_object

MODELS = Path(__file__).parents[2] / "models"
DONE = ".downloaded.json"
"""Names the files of a download that is complete, with their sizes in bytes."""
PIPELINE = "model_index.json"
"""Of a folder that holds the networks of a whole pipeline, each in a folder of its own."""
CONFIGS = ("config.json", "adapter_config.json")
"""What stands beside the weights of a library's network, or of peft's LoRA."""
USUAL_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "open_clip_model.safetensors")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(/\w[\w.-]*)*")
_WEIGHTS_ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_BESIDE_WEIGHTS = (".json", ".txt", ".model")
"""Configs, vocabularies, and sentencepiece's tokenizers."""
_PART = re.compile(r"-\d{5}-of-\d{5}")
_PICKLED = re.compile(rf"pytorch_model({_PART.pattern})?\.bin")
"""What transformers wrote before safetensors, as the first T5 are published; read without running code in it."""

_DOWNLOADS = ContextVar("downloads", default=True)
_PARTS: ContextVar[tuple[str, ...] | None] = ContextVar("parts of pipelines", default=None)

AnySettings = TypeVar("AnySettings", bound=Settings)


class OnlyOnHubError(UserError):
    """Weights that are not on this machine, where nothing may be downloaded; `name` is theirs on the hub."""

    def __init__(self, name: str):
        super().__init__(f"{name} is not on this machine")
        self.name = name


def with_local_weights(settings: AnySettings, keys: Collection[str] | None = None) -> AnySettings:
    """The settings with the local path of every key that names weights, or of those of them that are among `keys`;
    what is only on the hub is downloaded.

    Processes that ask at the same time wait for the one that downloads. Inside `only_shapes`, names of what is only on
    the hub stay, and nothing is downloaded.

    A run's folder stands for what it exported: `generator_checkpoint_path` for its generator, averaged where it is.

    Raises:
        DownloadError: see `local_weights`.
        UserError: a run exported something else.
    """
    values = dict(settings)
    known = [key for key in weights_keys(type(settings)) if key not in settings.unused]
    named = {key: values[key] for key in known if keys is None or key in keys}
    use_ema = values.get("use_ema", True)
    find = _here_or_on_hub if are_only_shapes() else given_weights
    local = {key: find(path, key, use_ema) for key, path in named.items() if path is not None}
    changed = {key: path for key, path in local.items() if path != named[key]}
    return settings.model_copy(update=changed) if changed else settings


def _here_or_on_hub(path: Path, key: str, use_ema: bool) -> Path:
    try:
        with without_downloads():
            return given_weights(path, key, use_ema)
    except OnlyOnHubError:
        return path


@contextmanager
def only_parts(*names: str) -> Iterator[None]:
    """Inside, of a pipeline on the hub the weights of some of its networks alone are downloaded, beside all configs.

    names: shell patterns of their folders, such as `text_encoder*`.
    """
    before = _PARTS.set(names)
    try:
        yield
    finally:
        _PARTS.reset(before)


@contextmanager
def without_downloads() -> Iterator[None]:
    """Inside, weights that are only on the hub are an OnlyOnHubError."""
    before = _DOWNLOADS.set(False)
    try:
        yield
    finally:
        _DOWNLOADS.reset(before)


def local_weights(name: Path, key: str, models: Path | None = None) -> Path:
    """The file or folder on this machine that holds the weights which a config names.

    Args:
        name: as the config has it; a path that does not exist and is no name of the hub is given back.
        key: the config key, which an error names.
        models: where downloads land; by default `models/` of this repository.

    Raises:
        DownloadError: no network, no such repository, no permission, or no safetensors in it.
        OnlyOnHubError: it would be downloaded, inside `without_downloads`.
    """
    text = name.as_posix()
    if name.exists() or not _HUB_NAME.fullmatch(text) or text.endswith(_WEIGHTS_ENDINGS):
        return name
    models = models or MODELS
    folder = models / text
    if _is_complete(folder):
        return _single_file(folder)
    if not _DOWNLOADS.get():
        raise OnlyOnHubError(text)
    models.mkdir(parents=True, exist_ok=True)
    with open_plain(models / f".{text.replace('/', '--')}.lock", "a") as lock:
        lock_file(lock, str(folder))
        if not _is_complete(folder):
            try:
                _download(text, folder, models)
            except DownloadError as error:
                raise DownloadError(
                    f"{key}: {text} is no file or folder here, and as a name of the hub: {error}"
                ) from error
    return _single_file(folder)


def hub_name(path: Path) -> str | None:
    """The name on the hub of a file or folder that was downloaded into `models/`; None for any other."""
    folders = [one for one in (path, *path.parents) if one.is_relative_to(MODELS) and one != MODELS]
    found = next((one for one in folders if any(one.glob(DONE.replace(".json", "*.json")))), None)
    return found and found.relative_to(MODELS).as_posix()


def listed_weights(entry: Path, key: str, use_ema: bool = True) -> Path:
    """The local file or folder of an entry of a list of weights, such as `lora`: named as weights are in a config (see
    this module), or the folder of a training run that exported them.

    Args:
        key: the list's key, and the name of what a run exports.

    Raises:
        UserError: the run exported something else; see `local_weights`.
    """
    return weights_in(local_weights(entry, key), key, use_ema)


def given_weights(path: Path, key: str, use_ema: bool = True) -> Path:
    """`local_weights`; of a run's folder, what the run exported: for `generator_checkpoint_path`, its generator.

    Raises:
        UserError: the run exported something else; see `local_weights`.
    """
    place = local_weights(path, key)
    try:
        return weights_in(place, key.removesuffix("_checkpoint_path"), use_ema)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _is_complete(folder: Path) -> bool:
    """Whether all files of a download that are wanted are there, in their sizes."""
    return any(done.is_file() and _has_all(folder, done) for done in (folder / DONE, _done(folder)))


def _has_all(folder: Path, done: Path) -> bool:
    sizes = read_object(done, f"{done}, which may be removed,")
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def _done(folder: Path) -> Path:
    """What names the files of a download, of which `only_parts` may want a part."""
    parts = _PARTS.get()
    if parts is None:
        return folder / DONE
    of_parts = re.sub(r"[^\w+]", "", "+".join(sorted(parts)))
    return folder / DONE.replace(".json", f".{of_parts}.json")


def _single_file(folder: Path) -> Path:
    """The folder; or, where it is no network of a library's, its one weights file."""
    files = list(folder.glob("*.safetensors"))
    single = len(files) == 1 and not any((folder / name).is_file() for name in (*CONFIGS, PIPELINE))
    return files[0] if single else folder


def _download(name: str, folder: Path, root: Path) -> None:
    owner, repository, *inside = name.split("/")
    repository = f"{owner}/{repository}"
    prefix = "".join(f"{part}/" for part in inside)
    listed = list_files(repository, "/".join(inside))
    done = _done(folder) if f"{prefix}{PIPELINE}" in listed else folder / DONE
    chosen = list(wanted(listed, prefix, name, _PARTS.get()))
    files = [look_up(repository, path) for path in chosen]
    targets = {file: folder / PurePosixPath(file.path.removeprefix(prefix)).parent for file in files}
    missing = [file for file in files if not (targets[file] / file.name).exists()]
    for file in files:
        problem = None if file in missing else difference(targets[file] / file.name, file, root)
        if problem:
            raise DownloadError(
                f"{targets[file] / file.name} is not the hub's ({problem}); move or delete it and start again"
            )
    check_space(missing, folder)
    for file in missing:
        fetch(file, targets[file], root)
    sizes = {file.path.removeprefix(prefix): file.size_bytes for file in files}
    write_whole(done, json.dumps(sizes, indent=1) + "\n")


def wanted(sizes: Mapping[str, int], prefix: str, name: str, parts: Collection[str] | None = None) -> Iterator[str]:
    """What of a repository's files is downloaded: configs, vocabularies and safetensors of the folder `prefix`, and of
    the folders of a pipeline's networks.

    Of several precisions the full one is taken. Pickled files are left out, but for those of transformers where there
    is nothing else.

    parts: patterns of the folders of a pipeline whose weights are downloaded; None for all.

    Raises:
        DownloadError: there are no safetensors, several that are not parts of one network, or a path that leads out.
    """
    by_folder: dict[str, list[str]] = {}
    for path in sizes:
        if ".." in path.split("/") or path.startswith("/") or "\0" in path:  # a false mirror may say so
            raise DownloadError(f"{name}: the hub names a file outside of its folder: {path!r}")
        by_folder.setdefault("".join(path.rpartition("/")[:2]), []).append(path)
    own = by_folder.get(prefix, [])
    pipeline = f"{prefix}{PIPELINE}" in own
    folders = (
        [f for f in by_folder if f.startswith(prefix) and f.count("/") <= prefix.count("/") + 1] if pipeline else []
    )
    found = pipeline and parts is not None  # its configs are enough
    for folder in sorted({prefix, *folders}):
        files = by_folder.get(folder, [])
        # Beside a pipeline's folders lie whole models in one file, which nobody asked for.
        own_name = folder.removeprefix(prefix).rstrip("/")
        left_out = pipeline and (folder == prefix or not _is_part(own_name, parts))
        weights = [] if left_out else _weights_of(files, name)
        found = found or bool(weights)
        if weights or folder == prefix or pipeline:
            yield from weights
            yield from (path for path in files if _is_beside(path.rpartition("/")[2]))
    if not found:
        raise DownloadError(f"{name} holds no .safetensors" + (
            "; name one of its folders: " + ", ".join(sorted({f.rstrip("/") for f in by_folder if f != prefix}))
            if len(by_folder) > 1 else ""
        ))  # fmt: skip


def _is_part(folder: str, parts: Collection[str] | None) -> bool:
    return parts is None or any(fnmatch(folder, part) for part in parts)


def _is_beside(name: str) -> bool:
    return name.endswith(_BESIDE_WEIGHTS) and not name.startswith(".")  # or it could pass for our own `DONE`


def _weights_of(files: list[str], name: str) -> list[str]:
    weights = [path for path in files if path.endswith(".safetensors")]
    weights = weights or [path for path in files if _PICKLED.fullmatch(path.rpartition("/")[2])]
    plain = [path for path in weights if not re.search(r"\.(fp16|bf16|non_ema)[.-]", path)] or weights
    parts = [path for path in plain if _PART.search(path)]
    usual = [path for usual in USUAL_NAMES for path in plain if path.rpartition("/")[2] == usual]
    chosen = usual[:1] or parts or plain
    if len(chosen) > 1 and chosen is not parts:
        raise DownloadError(
            f"{name} holds several weights files: {', '.join(chosen)}; download one of them, and name it"
        )
    return chosen
