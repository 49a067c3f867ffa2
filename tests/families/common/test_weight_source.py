"""Weights by file, folder or hub name: a small local server speaks the hub's part of HTTP."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from families.cascade.config import StageCConfig
from families.common import weight_source
from families.common.hub import RemoteFile
from families.common.weight_source import DONE, local_weights, only_parts, wanted, with_local_weights
from families.common.weights import WeightsError, existing_file
from tests.models.test_download import content
from tests.models.test_download import hub as hub
from tests.small_cascade import small_cascade as small_cascade
from train.train_c import TrainStageC
from warpcore.config import make_config
from warpcore.errors import UserError
from warpcore.keys import describe, weights_keys
from warpcore.meta import only_shapes

PROGRAM = """
import sys
from pathlib import Path
from families.common.weight_source import local_weights
from warpcore.errors import run_script
run_script(lambda: print(local_weights(Path(sys.argv[1]), "autoencoder", Path(sys.argv[2]))))
"""
VAE = {"config.json": b"{}", "diffusion_pytorch_model.safetensors": content(1)}
PIPELINE = {
    "model_index.json": b"{}",
    "whole.safetensors": content(9),
    "README.md": b"no",
    **{f"vae/{name}": found for name, found in VAE.items()},
    "vae/diffusion_pytorch_model.fp16.safetensors": content(2),
    "vae/diffusion_pytorch_model.bin": content(3),
    "tokenizer/vocab.json": b"{}",
    "tokenizer/merges.txt": b"",
    "unet/model.safetensors.index.json": b"{}",
    "unet/model-00001-of-00002.safetensors": content(4),
    "unet/model-00002-of-00002.safetensors": content(5),
}


def started(hub, name: str, models: Path) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": getattr(hub, "endpoint", hub), "HF_HOME": str(models / "home")}
    command = [sys.executable, "-c", PROGRAM, name, str(models)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def resolve(hub, name: str, models: Path) -> tuple[str, str]:
    """The path that is printed, and the error."""
    output, error = started(hub, name, models).communicate(timeout=120)
    return output.strip(), error


def files_in(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.mark.integration
def test_a_name_is_downloaded_once_by_one_of_several_processes_and_then_read_without_a_network(hub, tmp_path):
    for path, found in PIPELINE.items():
        hub.put("owner/pipe", path, found)
    together = [started(hub, "owner/pipe/vae", tmp_path) for _ in range(2)]
    printed = [process.communicate(timeout=120) for process in together]
    folder = tmp_path / "owner" / "pipe" / "vae"
    assert [output.strip() for output, _ in printed] == [str(folder)] * 2, printed
    assert files_in(folder) == VAE
    assert sorted(hub.requests) == [(name, 0) for name in sorted(VAE)]  # each file once
    assert resolve("http://127.0.0.1:9", "owner/pipe/vae", tmp_path)[0] == str(folder)


@pytest.mark.integration
def test_mistakes_of_a_name_are_named_and_what_is_whole_is_not_fetched_again(hub, tmp_path):
    for path, found in VAE.items():
        hub.put("owner/vae", path, found)
    weights = "diffusion_pytorch_model.safetensors"
    hub.hashes[f"/owner/vae/resolve/main/{weights}"] = hashlib.sha256(b"other").hexdigest()
    _, error = resolve(hub, "owner/vae", tmp_path)
    assert "error: autoencoder: owner/vae is no file or folder here, and as a name of the hub:" in error
    assert "arrived damaged" in error
    assert "Traceback" not in error
    assert not (tmp_path / "owner" / "vae" / DONE).exists()
    hub.hashes.clear()
    assert resolve(hub, "owner/vae", tmp_path)[0] == str(tmp_path / "owner" / "vae")
    assert [name for name, _ in hub.requests].count("config.json") == 1
    assert "has no owner/nothing" in resolve(hub, "owner/nothing", tmp_path)[1]
    assert not (tmp_path / "owner" / "nothing").exists()


@pytest.mark.integration
@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_named(tmp_path):
    assert "can't reach http://127.0.0.1:9" in resolve("http://127.0.0.1:9", "owner/other", tmp_path)[1]


def names(repository: dict[str, bytes], prefix: str = "") -> set[str]:
    sizes = {path: len(found) for path, found in repository.items() if path.startswith(prefix)}
    return set(wanted(sizes, prefix, "owner/name"))


def test_configs_and_full_precision_safetensors_are_wanted():
    assert names(PIPELINE, "vae/") == {f"vae/{name}" for name in VAE}
    assert names(PIPELINE) == PIPELINE.keys() - {
        "whole.safetensors", "README.md", "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.bin",
    }  # fmt: skip
    assert names({"a/model.fp16.safetensors": b"1", "a/model.bin": b"2"}, "a/") == {"a/model.fp16.safetensors"}


def test_of_a_pipeline_only_the_networks_that_are_wanted_are_downloaded_and_later_the_rest(tmp_path, monkeypatch):
    fetched = []

    def fetch(file, folder, root):
        fetched.append(file.path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file.name).write_bytes(PIPELINE[file.path])

    monkeypatch.setattr(weight_source, "list_files", lambda *_: {path: len(one) for path, one in PIPELINE.items()})
    monkeypatch.setattr(
        weight_source, "look_up", lambda name, path: RemoteFile(name, path, "", len(PIPELINE[path]), "")
    )
    monkeypatch.setattr(weight_source, "fetch", fetch)
    monkeypatch.setattr(weight_source, "difference", lambda *_: None)
    expected = names(PIPELINE)
    weights = {path for path in expected if path.endswith(".safetensors")}
    for parts, added in ((("vae",), {f"vae/{next(reversed(VAE))}"}), (("text_encoder*", "tokenizer*"), set())):
        for again in (False, True):
            fetched.clear()
            with only_parts(*parts):
                folder = local_weights(Path("owner/pipe"), "generator_checkpoint_path", tmp_path)
            assert weights & set(fetched) == (set() if again else added)
    assert files_in(folder).keys() == expected - weights | {"vae/diffusion_pytorch_model.safetensors"}
    assert local_weights(Path("owner/pipe"), "generator_checkpoint_path", tmp_path) == folder
    assert set(fetched) == {path for path in weights if path.startswith("unet/")}
    assert files_in(folder).keys() == expected


@pytest.mark.parametrize(
    ("repository", "told"),
    [
        (
            {"stage_a.safetensors": b"1", "stage_b.safetensors": b"2"},
            "holds several weights files: stage_a.safetensors",
        ),
        ({"model.bin": b"1"}, "owner/name holds no .safetensors"),
        ({"a.txt": b"", "vae/model.safetensors": b"1"}, "no .safetensors; name one of its folders: vae"),
    ],
)
def test_a_repository_without_one_network_is_refused(repository, told):
    with pytest.raises(weight_source.DownloadError, match=told):
        names(repository)


@pytest.mark.parametrize("path", ["../evil.json", "/evil.json", "unet/../../evil.safetensors"])
def test_a_hub_that_names_files_outside_of_a_repository_is_refused(path):
    with pytest.raises(weight_source.DownloadError, match="outside of its folder"):
        names({"model_index.json": b"", "unet/model.safetensors": b"", path: b""})


@pytest.mark.parametrize("name", ["owner/name/..", "owner/name/../../..", "owner/name/.hidden", "../owner/name"])
def test_a_name_that_leads_out_of_the_folder_of_models_is_no_name_of_the_hub(name, tmp_path):
    assert local_weights(Path(name), "autoencoder", tmp_path / "models") == Path(name)
    assert not (tmp_path / "models").exists()


def test_what_is_on_this_machine_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert local_weights(Path("owner/name"), "key", tmp_path / "models") == Path("owner/name")
    for name in ("runs/gone.safetensors", "/somewhere/else", "gone", "../owner/name/x"):
        assert local_weights(Path(name), "key", tmp_path / "models") == Path(name)
    assert not (tmp_path / "models").exists()


@pytest.fixture
def downloaded(small_cascade, tmp_path, monkeypatch) -> Path:
    """The generator of the small cascade, as an earlier download of `owner/stage-c` left it."""
    monkeypatch.setattr(weight_source, "MODELS", tmp_path / "models")
    folder = tmp_path / "models" / "owner" / "stage-c"
    folder.mkdir(parents=True)
    file = folder / "finetuned.safetensors"
    file.write_bytes(Path(small_cascade["generator_checkpoint_path"]).read_bytes())
    (folder / DONE).write_text(json.dumps({file.name: file.stat().st_size}))
    return file


@pytest.mark.integration
def test_a_script_trains_from_a_name_of_the_hub(small_cascade, downloaded):
    config = make_config(TrainStageC.Config, small_cascade | {"generator_checkpoint_path": "owner/stage-c"})
    run = TrainStageC(config)
    assert run.config.generator_checkpoint_path == downloaded
    assert run.run() == 0


def test_an_incomplete_download_is_looked_for_again(downloaded, monkeypatch):
    def refuse(*_):
        raise weight_source.DownloadError("no network")

    monkeypatch.setattr(weight_source, "list_files", refuse)
    assert local_weights(Path("owner/stage-c"), "key") == downloaded
    save_file({"a": torch.zeros(1)}, downloaded)
    with pytest.raises(
        weight_source.DownloadError, match=r"key: owner/stage-c is no file or folder here, .*no network"
    ):
        local_weights(Path("owner/stage-c"), "key")


def test_keys_of_weights_have_one_type_and_say_what_they_take(small_cascade):
    keys = weights_keys(StageCConfig)
    assert {"generator_checkpoint_path", "effnet_checkpoint_path", "previewer_checkpoint_path"} <= set(keys)
    assert not {"checkpoint_path", "output_path", "cache_path"} & set(keys)
    types = {name: of_type for name, of_type, *_ in describe(StageCConfig)}
    assert types["generator_checkpoint_path"] == "file | folder | hub name"
    config = make_config(StageCConfig, small_cascade)
    assert with_local_weights(config) is config


def test_weights_that_a_script_has_no_use_for_are_not_downloaded(small_cascade, monkeypatch):
    monkeypatch.setattr(weight_source, "local_weights", lambda path, key: pytest.fail(f"{key} is looked for"))
    config = make_config(StageCConfig, small_cascade | {"generator_checkpoint_path": None})
    assert "stage_a_checkpoint_path" in StageCConfig.unused
    with_local_weights(config.model_copy(update={"stage_a_checkpoint_path": Path("owner/stage-a")}))


def test_the_folder_of_a_run_stands_for_what_it_exported(small_cascade, tmp_path):
    config = make_config(StageCConfig, small_cascade | {"generator_checkpoint_path": str(tmp_path / "run")})
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("updates: 1\n", encoding="utf-8")
    save_file({"a": torch.zeros(1)}, run / "lora.safetensors", {"update": "1"})
    with pytest.raises(UserError, match=r"generator_checkpoint_path: .*holds no generator\.safetensors, but lora"):
        with_local_weights(config)
    for name in ("generator", "generator_ema"):
        save_file({"a": torch.zeros(1)}, run / f"{name}.safetensors", {"update": "1"})
    assert with_local_weights(config).generator_checkpoint_path == run / "generator_ema.safetensors"
    with only_shapes():
        assert with_local_weights(config).generator_checkpoint_path == run / "generator_ema.safetensors"


def test_for_shapes_names_of_the_hub_stay_but_for_what_was_downloaded(small_cascade, downloaded, monkeypatch):
    monkeypatch.setattr(weight_source, "list_files", lambda *_: pytest.fail("it asks the hub"))
    given = {"generator_checkpoint_path": "owner/stage-c", "effnet_checkpoint_path": "owner/effnet"}
    with only_shapes():
        config = with_local_weights(make_config(StageCConfig, small_cascade | given))
    assert config.generator_checkpoint_path == downloaded
    assert config.effnet_checkpoint_path == Path("owner/effnet")


def test_a_folder_in_which_nothing_was_saved_is_no_file_of_weights(tmp_path):
    with pytest.raises(WeightsError, match=r"^controlnet: .* is a folder in which no training run has saved"):
        existing_file(tmp_path, "controlnet")
