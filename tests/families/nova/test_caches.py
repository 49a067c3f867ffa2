"""A cache of own clips: captions that are empty, and a motion score that some clips lack."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.clips import write_clips
from tests.families.nova.test_imports import OF_CLIPS, SCRIPT, losses, settings
from tests.tools.test_cache_reuse import members
from tools import cache
from warpcore.errors import UserError

pytestmark = pytest.mark.integration
SOME_EMPTY = ["json", 'lambda j: "" if j["label"] == 1 else j["caption"]']


def without_scores(tar: Path) -> None:
    kept = {name: data for name, data in members(tar).items() if not name.endswith("json")}
    with tarfile.open(tar, "w") as file:
        for name, data in kept.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            file.addfile(about, io.BytesIO(data))


def test_empty_captions_and_motion_scores_are_cached_and_trained_on(tmp_path, capsys):
    write_clips(tmp_path / "data" / "a.tar", 4)
    of_training = settings(tmp_path, tmp_path / "data", **OF_CLIPS, captions_getter=SOME_EMPTY, frame_stride=1)
    config = tmp_path / "clips.yaml"
    config.write_text(yaml.safe_dump(of_training), encoding="utf-8")
    cache.main([str(SCRIPT), str(config), str(tmp_path / "cache"), "--dtype", "float32"])
    assert "ms with this cache" in capsys.readouterr().out  # a run was timed, which is told the score of each clip
    texts = {name: np.load(io.BytesIO(data)) for name, data in members(tmp_path / "cache" / "a.tar").items()
             if name.endswith("text.npy")}  # fmt: skip
    assert [len(texts[f"{number:05d}.text.npy"]) > 0 for number in range(4)] == [True, False, True, True]
    assert len(losses(of_training, tmp_path / "cache", "clips")) == 2


def test_a_motion_score_that_some_clips_lack_is_told_before_all_is_encoded(tmp_path):
    write_clips(tmp_path / "data" / "a.tar", 2)
    without_scores(write_clips(tmp_path / "data" / "b.tar", 1, first=2))
    of_training = settings(tmp_path, tmp_path / "data", **OF_CLIPS, frame_stride=1)
    config = tmp_path / "clips.json"
    config.write_text(json.dumps(of_training), encoding="utf-8")
    with pytest.raises(UserError, match=r"columns: 1 of 3 training samples have no 'flow'\. Write it into their"):
        cache.main([str(SCRIPT), str(config), str(tmp_path / "cache")])
    assert not list((tmp_path / "cache").glob("*.tar"))
