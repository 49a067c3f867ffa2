"""Caches whose pictures are taken out, of which one is recreated alone, or that are decoded to look at."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from families.common.weight_source import _PARTS
from tests.made_up_family.networks import Squeeze
from tests.test_made_up_caches import both, built, counted, make
from tests.test_made_up_caches import of_family as of_family
from tests.test_made_up_caches import settings as settings
from tests.test_made_up_family import SCRIPT, config_file, run_tool, train
from tests.test_made_up_family import _known as _known
from tests.tools.test_cache_reuse import members, write_members
from tests.warpcore.runs import write_shard
from tools import cache, cache_features
from warpcore.errors import UserError
from warpcore.pictures import read_cells

pytestmark = pytest.mark.integration


def test_pictures_that_were_taken_out_leave_the_caches_and_the_training_and_nothing_is_encoded(
    settings, tmp_path, monkeypatch
):
    encoded = counted(monkeypatch)
    latents, texts = both(settings, tmp_path)
    assert encoded == {"pictures": 12, "captions": 12}
    encoded.clear()
    tars = [Path(settings["webdataset_path"], name, "a.tar") for name in ("one", "two")]
    rows = [members(tar) for tar in tars]
    keys = [sorted({name.split(".")[0] for name in one}) for one in rows]
    kept = {*keys[0][:4], *keys[1][3:]}  # of the last, the rows move to the other tar
    write_members(tars[0], {name: data for one in rows for name, data in one.items() if name.split(".")[0] in kept})
    shutil.rmtree(tars[1].parent)
    with pytest.raises(UserError, match=r"latents lacks 3 of 7 samples, of .*one/a.tar: make it complete"):
        train(settings, experiment_id="before", caches=[latents, texts])
    both(settings, tmp_path)
    assert encoded == {}
    for folder in (latents, texts):
        (tar,) = Path(folder).rglob("*.tar")
        assert {name.split(".")[0] for name in members(tar)} == kept
        assert not list(Path(folder).rglob(".*.old"))
    expected = built(settings, experiment_id="pictures")[1]
    for name, path in (("caches", settings["webdataset_path"]), ("alone", None)):
        names, found = built(settings, experiment_id=name, webdataset_path=path, caches=[latents, texts])
        assert names == {"generator"}
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_cache_of_other_data_does_not_lose_its_tars(settings, tmp_path):
    latents = make(settings, tmp_path, "latents", "--features", "latents")
    other = write_shard(tmp_path / "other" / "b.tar", 6, (16, 32)).parent
    with pytest.raises(UserError, match=r"one/a.tar mirrors no tar of webdataset_path"):
        make(settings | {"webdataset_path": str(other)}, tmp_path, "latents", "--features", "latents")
    assert len(list(Path(latents).rglob("*.tar"))) == 2


def test_a_cache_within_another_one_does_not_lose_its_tars(settings, tmp_path):
    make(settings, tmp_path, "latents", "--features", "latents")
    inner = make(settings, tmp_path, "latents/texts", "--features", "texts")
    with pytest.raises(UserError, match=r"latents/texts/one/a.tar mirrors no tar of webdataset_path"):
        make(settings, tmp_path, "latents", "--features", "latents")
    assert len(list(Path(inner).rglob("*.tar"))) == 2


def test_caches_of_one_kind_are_deleted_and_made_again_alone(settings, tmp_path, monkeypatch):
    encoded = counted(monkeypatch)
    folders = both(settings, tmp_path)
    expected = built(settings, experiment_id="before", caches=list(folders))[1]
    for kind, folder, made in zip(("latents", "texts"), folders, ("pictures", "captions"), strict=True):
        shutil.rmtree(folder)
        encoded.clear()
        make(settings, tmp_path, kind, "--features", kind)
        assert encoded == {made: 12}
        assert built(settings, experiment_id=kind, caches=list(folders))[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["latents", "all"])
def test_cached_latents_are_decoded_to_look_at(settings, tmp_path, kind):
    cached, sheet = make(settings, tmp_path, kind, "--features", kind), tmp_path / "seen" / "sheet.png"
    before = {path: path.read_bytes() for path in Path(cached).rglob("*") if path.is_file()}
    told = run_tool(cache.main, SCRIPT, config_file(settings, tmp_path), cached, "--preview", "99", sheet)
    assert f"12 pictures: {sheet}" in told
    assert before == {path: path.read_bytes() for path in Path(cached).rglob("*") if path.is_file()}
    contents = {name: data for tar in Path(cached).rglob("*.tar") for name, data in members(tar).items()}
    squeeze = Squeeze()
    squeeze.load_state_dict(load_file(settings["squeeze_path"]))
    expected = {}
    for name, latent in contents.items():
        if name.endswith(".latent.npy"):
            with torch.no_grad():
                (picture,) = squeeze.decode(torch.from_numpy(np.load(io.BytesIO(latent)))[None])
            expected[contents[name.replace("latent.npy", "txt")].decode()] = picture.permute(1, 2, 0) * 255
    pixels, cells = np.array(Image.open(sheet)), read_cells(sheet)
    assert {cell.caption for cell in cells} == expected.keys()
    for cell in cells:
        shown = pixels[cell.top :, cell.left :][: cell.height, : cell.width]
        np.testing.assert_allclose(shown, expected[cell.caption], atol=0.51)


def test_a_preview_downloads_no_more_than_its_cache_was_made_with(settings, tmp_path, monkeypatch):
    kinds, asked = ("latents", "all"), []
    folders = [make(settings, tmp_path, kind, "--features", kind) for kind in kinds]

    def without_idle_weights(kind, config, features):
        asked.append((features, _PARTS.get()))
        return cache_features.without_idle_weights(kind, config, features)

    monkeypatch.setattr(cache, "without_idle_weights", without_idle_weights)
    for folder in folders:
        run_tool(
            cache.main, SCRIPT, config_file(settings, tmp_path), folder, "--preview", 1, tmp_path / f"{folder}.png"
        )
    assert asked == [(kind, cache_features.PIPELINE_PARTS[kind]) for kind in kinds]


def test_a_preview_that_can_not_be_made_is_refused(settings, tmp_path):
    latents, texts = both(settings, tmp_path)

    def refusal(settings: dict, folder: str, *options: object) -> str:
        with pytest.raises(UserError) as error:
            run_tool(cache.main, SCRIPT, config_file(settings, tmp_path), folder, "--preview", *options)
        return str(error.value)

    sheet = tmp_path / "a.png"
    assert "texts holds nothing that was made of pictures: name a cache of latents" in refusal(
        settings, texts, 2, sheet
    )
    assert "pictures holds no cache" in refusal(settings, settings["webdataset_path"], 2, sheet)
    assert "--preview: expected a number above 0" in refusal(settings, latents, 0, sheet)
    assert "is no name of a PNG file" in refusal(settings, latents, 2, tmp_path / "a.jpg")
    assert not sheet.exists()
    sheet.touch()
    assert "a.png is there already: name another file" in refusal(settings, latents, 2, sheet)
    sheet.unlink()
    save_file(Squeeze().state_dict(), tmp_path / "other.safetensors")
    other = settings | {"squeeze_path": str(tmp_path / "other.safetensors")}
    told = refusal(other, latents, 2, sheet)
    assert "the weights of the squeeze network are squeeze.safetensors" in told
    assert f".py {config_file(other, tmp_path)} " in told  # the command that makes another cache can be pasted
