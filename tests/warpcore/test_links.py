"""What others put in a run's folder, or into a checkpoint's manifest, makes a run write nowhere else."""

import json

import pytest

from tests.warpcore.runs import tiny_settings, train_here, write_shard
from warpcore.errors import UserError
from warpcore.files import open_plain
from warpcore.places import read_manifest

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(tmp_path) -> dict:
    return tiny_settings(
        tmp_path / "runs", write_shard(tmp_path / "a.tar", 6), updates=2, save_every=1, backup_every=1
    )


@pytest.mark.parametrize("name", ["state", "state/00000001.partial", "backups", "backups/00000001", "samples"])
def test_a_folder_in_a_runs_folder_that_is_a_link_is_refused_and_nothing_is_written_there(settings, tmp_path, name):
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "runs" / "tiny" / name
    (elsewhere / "1.partial").mkdir(parents=True)
    (elsewhere / "1.partial" / "mine").touch()
    before = sorted(elsewhere.rglob("*"))
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{link} is a link"):
        train_here(settings)
    assert sorted(elsewhere.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "notes.jsonl", ".lock", "config.yaml.partial", "info.json.partial", "generator.partial"]
)
def test_a_file_in_a_runs_folder_that_is_a_link_is_refused_and_not_written_through(settings, tmp_path, name):
    elsewhere, link = tmp_path / "elsewhere", tmp_path / "runs" / "tiny" / name
    elsewhere.write_text("mine")
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"{link} is a link"):
        train_here(settings)
    assert elsewhere.read_text() == "mine"


def test_a_checkpoint_path_or_a_runs_folder_that_is_a_link_to_another_disk_is_fine(settings, tmp_path):
    (tmp_path / "disk" / "tiny_is_here").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "tiny").symlink_to(tmp_path / "disk" / "tiny_is_here")
    assert train_here(settings)[0] == 0
    assert (tmp_path / "disk" / "tiny_is_here" / "state").is_dir()


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/b", "a\\b", "..", ".", "", "a\0b"])
def test_a_manifest_that_names_more_than_plain_files_is_damage(tmp_path, name):
    entry = {"bytes": 1, "sha256": "0"}
    manifest = {"files": {"state.json": entry, ".metadata": entry, name: entry}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert f"lists {name!r}, which is not a plain file name" in read_manifest(tmp_path)


def test_a_checkpoint_with_such_a_manifest_is_passed_over(settings, tmp_path, caplog):
    train_here(settings)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    path = tmp_path / "runs" / "tiny" / "state" / "00000002" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][str(victim)] = {"bytes": 4, "sha256": "0"}
    path.write_text(json.dumps(manifest))
    assert train_here(settings)[0] == 0
    assert "update 2 is damaged" in caplog.text
    assert victim.read_text() == "mine"


def test_text_is_written_as_utf_8_under_any_locale(tmp_path):
    with open_plain(tmp_path / "a", "w") as file:
        assert file.encoding == "utf-8"
