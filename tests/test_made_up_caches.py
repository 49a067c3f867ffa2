"""Caches of pictures and of texts lie apart: each is made, extended and used alone, and together they equal one."""

import io
import json
import shlex
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence

from families.common.features import CAPTION_SETTINGS, Feature, lengths_name, stored
from tests.made_up_family.networks import LetterCount
from tests.made_up_family.train_made_up import MadeUpConfig, TrainMadeUp
from tests.test_made_up_family import SCRIPT, config_file, losses, run_tool, train
from tests.test_made_up_family import _known as _known
from tests.test_made_up_family import settings as of_family  # noqa: F401
from tests.tiers import represented_by
from tests.warpcore.runs import read_metrics, write_shard
from tools import cache
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


@pytest.fixture
def settings(tmp_path, of_family) -> dict:  # noqa: F811
    """Of two tars, in folders."""
    for name, first in (("one", 0), ("two", 6)):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        write_shard(tmp_path / "pictures" / name / "a.tar", 6, (16, 32), first)
    return of_family | {"webdataset_path": str(tmp_path / "pictures"), "crop_mode": "center"}


def make(settings: dict, tmp_path: Path, name: str, *options: str) -> str:
    out = tmp_path / name
    run_tool(cache.main, SCRIPT, config_file(settings, tmp_path), out, "--dtype", "float32", *options)
    return str(out)


def counted(monkeypatch) -> Counter:
    """How many pictures and captions the tool encodes from now on."""
    encoded = Counter()

    class Counted(TrainMadeUp):
        def picture_features(self, batch, random):
            encoded.update({"pictures": len(batch.keys)} if batch.keys != [""] else {})  # it looks at a black one
            return super().picture_features(batch, random)

        def text_features(self, encoder, captions):
            encoded.update({"captions": len(captions)} if captions != [""] else {})
            return super().text_features(encoder, captions)

    monkeypatch.setattr(cache, "use_case", lambda script: Counted)
    monkeypatch.setattr(cache.Caching, "waits", lambda self: None)  # that measurement encodes samples again
    return encoded


def both(settings: dict, tmp_path: Path) -> tuple[str, str]:
    return tuple(make(settings, tmp_path, kind, "--features", kind) for kind in ("latents", "texts"))


def built(settings: dict, **changes) -> tuple[set[str], list[float]]:
    """The networks of a run, and its losses."""
    given, names = settings | changes, []

    class Watched(TrainMadeUp):
        def build(self):
            networks = super().build()
            names.extend(networks)
            return networks

    run = Watched(make_config(MadeUpConfig, given))
    run.drawn_with = frozenset()
    run.sample = lambda held_out: []
    assert run.run() == 0
    return set(names), losses(read_metrics(given))


def test_latents_and_texts_lie_apart(settings, tmp_path):
    latents, texts = both(settings, tmp_path)
    assert {kind: list(json.loads(Path(kind, "cache.json").read_text())["features"]) for kind in (latents, texts)} == {
        latents: ["latent"], texts: ["letters"],
    }  # fmt: skip
    every, expected = built(settings)
    assert every == {"generator", "squeeze", "text"}
    text_cached = built(settings, experiment_id="texts", caches=[texts])
    assert text_cached == ({"generator", "squeeze"}, pytest.approx(expected, rel=1e-5))
    latents_cached = built(settings, experiment_id="latents", caches=[latents])
    assert latents_cached == ({"generator", "text"}, pytest.approx(expected, rel=1e-5))
    shutil.rmtree(settings["webdataset_path"])
    alone = {key: value for key, value in settings.items() if key != "webdataset_path"}
    for number, caches in enumerate(([latents, texts], [texts, latents])):
        found = built(alone, experiment_id=f"both {number}", caches=caches)
        assert found == ({"generator"}, pytest.approx(expected, rel=1e-5))
    part = {"webdataset_path": [{"path": f"{latents}/one", "weight": 2}, f"{latents}/two"]}
    names, _ = built(settings | part, experiment_id="weighted", caches=[latents, texts])
    assert names == {"generator"}


def test_a_cache_of_texts_is_made_from_one_of_latents(settings, tmp_path):
    latents = make(settings, tmp_path, "latents", "--features", "latents")
    shutil.rmtree(settings["webdataset_path"])
    texts = make(settings | {"webdataset_path": latents}, tmp_path, "texts", "--features", "texts")
    names, _ = built(settings | {"webdataset_path": latents}, caches=[texts])
    assert names == {"generator"}
    with pytest.raises(UserError, match="is a cache already: name pictures"):
        make(settings | {"webdataset_path": latents}, tmp_path, "again")


def test_the_empty_text_comes_with_the_cache_of_texts(settings, tmp_path, monkeypatch):
    latents, texts = both(settings, tmp_path)
    given = settings | {"caches": [latents, texts], "webdataset_path": latents}
    monkeypatch.setattr(LetterCount, "__init__", lambda *_: pytest.fail("the text encoder was built"))
    train(given)
    assert not (tmp_path / "runs" / "run" / "prompts.safetensors").exists()
    monkeypatch.undo()
    Path(texts, "prompts.safetensors").unlink()
    train(given, experiment_id="lacking")
    assert (tmp_path / "runs" / "lacking" / "prompts.safetensors").exists()


def told_command(message: str) -> list[str]:
    """The arguments of the command at the end of an error message."""
    words = shlex.split(message.partition("python3 tools/cache.py ")[2])
    assert words[0] == str(SCRIPT.relative_to(Path.cwd()))
    return words


def test_a_cache_that_lacks_rows_is_extended_by_the_command_that_is_told(settings, tmp_path):
    latents, texts = both(settings, tmp_path)
    write_shard(Path(settings["webdataset_path"], "two", "a.tar"), 9, (16, 32), 6)
    run = TrainMadeUp(make_config(MadeUpConfig, settings | {"caches": [texts]}))
    run.arguments = [str(config_file(settings | {"caches": [texts]}, tmp_path)), "batch_size=4"]
    with pytest.raises(UserError, match=r"texts lacks 3 of 15 samples, of .*two/a.tar: ") as error:
        run.run()
    run_tool(cache.main, *told_command(str(error.value)))
    names, extended = built(settings, caches=[texts])
    assert names == {"generator", "squeeze"}
    assert extended == pytest.approx(built(settings, experiment_id="plain")[1], rel=1e-5)
    with pytest.raises(UserError, match="latents lacks 3 of 15 samples"):
        train(settings, experiment_id="both", caches=[latents, texts])


def test_caches_without_pictures_hold_the_same_samples(settings, tmp_path):
    latents, texts = both(settings, tmp_path)
    alone = {"webdataset_path": None, "caches": [latents, texts]}
    Path(latents, "two", "a.tar").unlink()
    for index in Path(latents).rglob("*.parquet"):
        index.unlink()
    with pytest.raises(UserError, match=r"lacks 6 samples that .*texts holds, of .*texts/two/a.tar: make it complete"):
        train(settings, **alone)
    part = {"webdataset_path": str(Path(latents, "one", "a.tar")), "caches": [texts]}
    assert train(settings, experiment_id="part", **part)


def test_a_cache_of_captions_that_were_edited_is_refused(settings, tmp_path):
    texts = make(settings, tmp_path, "texts", "--features", "texts")
    edit(Path(settings["webdataset_path"], "two", "a.tar"), b"picture 7", b"pictures!")
    with pytest.raises(UserError, match=r"two/a.tar changed since .*two/a.tar was made from it: make it"):
        train(settings, caches=[texts])
    make(settings, tmp_path, "texts", "--features", "texts")
    train(settings, caches=[texts], experiment_id="updated")


def edit(tar: Path, caption: bytes, to: bytes) -> None:
    """Replace a caption by one of the same length."""
    content = tar.read_bytes()
    assert content.count(caption) == 1
    tar.write_bytes(content.replace(caption, to))


def follow_commands(message: str, settings: dict, tmp_path: Path) -> list[str]:
    """Run the commands at the end of an error message; the folders that they made."""
    found = []
    for command in message.split("python3 tools/cache.py ")[1:]:
        _, config, *words = told_command(f"python3 tools/cache.py {command.removesuffix(' && ')}")
        assert config == "CONFIG", "a training that no script started knows no file"
        run_tool(cache.main, SCRIPT, config_file(settings, tmp_path), *words)
        found.append(words[0])
    return found


@pytest.mark.parametrize("first", represented_by("latents", of=["latents", "texts"]))
def test_caches_of_different_ages_are_noticed_without_pictures(settings, tmp_path, first):
    latents = make(settings, tmp_path, "latents", "--features", "latents")
    edit(Path(settings["webdataset_path"], "two", "a.tar"), b"picture 7", b"pictures!")
    texts = make(settings, tmp_path, "texts", "--features", "texts")
    alone = {"webdataset_path": None, "caches": [latents, texts] if first == "latents" else [texts, latents]}
    with pytest.raises(UserError, match=r"two/a.tar and .*two/a.tar were made from different content of") as error:
        train(settings, **alone)
    assert follow_commands(str(error.value), settings, tmp_path) == alone["caches"]
    assert train(settings, experiment_id="updated", **alone)


def test_caches_of_another_cache_that_changed_are_noticed(settings, tmp_path):
    latents = make(settings, tmp_path, "latents", "--features", "latents")
    texts = make(settings | {"webdataset_path": latents}, tmp_path, "texts", "--features", "texts")
    given = {"webdataset_path": latents, "caches": [texts]}
    assert train(settings, **given)
    edit(Path(settings["webdataset_path"], "two", "a.tar"), b"picture 7", b"pictures!")
    make(settings, tmp_path, "latents", "--features", "latents")
    with pytest.raises(UserError, match=r"latents/two/a.tar changed since .*texts/two/a.tar was made from it"):
        train(settings, experiment_id="stale", **given)


def test_older_caches_that_can_not_be_compared_are_used_and_named(settings, tmp_path, capfd):
    latents, texts = both(settings, tmp_path)
    given = {"webdataset_path": None, "caches": [latents, texts]}
    for file in [*Path(latents).rglob("cache.sources.json"), *Path(texts).rglob("cache.sources.json")]:
        file.unlink()
    assert train(settings, **given)
    assert "is not known" not in capfd.readouterr().err, "their records agree"
    for record in Path(texts).rglob("*.cache.json"):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"source": [1, "mtime-1"]}))
    assert train(settings, experiment_id="older", **given)
    told = capfd.readouterr().err
    assert "pictures and captions is not known: an earlier version made" in told
    assert told.count("is not known") == 1
    Path(texts, "one", "a.tar.cache.json").write_text("[")
    with pytest.raises(UserError, match=r"texts/one/a.tar.cache.json is damaged \(.*\): remove it"):
        train(settings, experiment_id="damaged", **given)


def test_caches_that_store_a_feature_differently_are_refused_with_the_command_for_another(settings, tmp_path):
    latents = make(settings, tmp_path, "latents", "--features", "latents")
    (tmp_path / "held").mkdir()
    held = {"webdataset_path": str(write_shard(tmp_path / "held" / "b.tar", 4, (16, 32), 20))}
    held_latents = make(settings | held, tmp_path, "held_latents", "--features", "latents", "--dtype", "float16")
    given = settings | {"validation_samples": 0, "validation_path": held["webdataset_path"], "caches": [latents]}
    with pytest.raises(ConfigError, match=r"store latent differently \(dtype: float32 and float16\)") as error:
        train(given, validation_caches=[held_latents])
    assert train(given, validation_caches=follow_commands(str(error.value), settings, tmp_path))


def test_a_cache_without_crops_is_refused_with_the_command_for_another(settings, tmp_path, monkeypatch):
    latents = make(settings, tmp_path, "latents", "--features", "latents")
    for tar in Path(latents).rglob("a.tar"):
        tar.write_bytes(tar.read_bytes().replace(b'"crops"', b'"crape"'))
    monkeypatch.setattr(TrainMadeUp, "needs_geometry", True)
    with pytest.raises(UserError, match=r"latents/.*a.tar does not say how its pictures were cropped") as error:
        train(settings, caches=[latents])
    assert told_command(str(error.value))[2] == f"{latents}_new"


def test_what_does_not_fit_is_refused(settings, tmp_path):
    latents, texts = both(settings, tmp_path)
    whole = make(settings, tmp_path, "whole")
    with pytest.raises(ConfigError, match=r"whole and .*texts both hold letters: name one of them alone"):
        train(settings, webdataset_path=whole, caches=[texts])
    with pytest.raises(ConfigError, match=r"texts is a cache that this run can't use: it has no latent, but letters"):
        train(settings, webdataset_path=texts)
    with pytest.raises(ConfigError, match=r"pictures holds no cache \(cache.json\). Make it: python3 tools/cache.py "):
        train(settings, caches=[settings["webdataset_path"]])
    other = tmp_path / "other.safetensors"
    torch.manual_seed(1)
    save_file(LetterCount().state_dict(), other)
    with pytest.raises(ConfigError, match="the weights of the text network are") as error:
        train(settings, caches=[texts], letters_path=str(other))
    assert told_command(str(error.value))[2:] == [
        f"{texts}_new", f"webdataset_path={settings['webdataset_path']}", "--features", "texts", "--dtype", "float32",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="captions_getter is"):
        train(settings, caches=[texts], captions_getter=["txt", "lambda t: t[:3]"])
    train(settings, caches=[texts], experiment_id="random crops", crop_mode="random")
    with pytest.raises(ConfigError, match="crop_mode is 'center' in the cache, 'random' here"):
        train(settings, caches=[latents], crop_mode="random")
    with pytest.raises(UserError, match="--variants are crops of pictures"):
        make(settings, tmp_path, "again", "--features", "texts", "--variants", "2")
    origin = Path(texts, "cache.json").read_text()
    for damaged, told in (
        ("{", "is incomplete"),
        ('{"version": 1}', "is damaged"),
        ('{"version": 2}', "not of version"),
    ):
        Path(texts, "cache.json").write_text(damaged)
        with pytest.raises(UserError, match=rf"texts/cache.json .*{told}.*; make another: ") as error:
            train(settings, caches=[texts])
        assert told_command(str(error.value))[2] == f"{texts}_new"
        with pytest.raises(UserError, match=rf"texts/cache.json .*{told}.*; remove the folder"):
            make(settings, tmp_path, "texts", "--features", "texts")
    Path(texts, "cache.json").write_text(origin)


def test_held_out_samples_have_caches_of_their_own(settings, tmp_path):
    latents, texts = both(settings, tmp_path)
    (tmp_path / "held").mkdir()
    held = {"webdataset_path": str(write_shard(tmp_path / "held" / "b.tar", 4, (16, 32), 20))}
    expected = built(settings, validation_path=held["webdataset_path"], validation_samples=0)[1]
    given = settings | {"validation_samples": 0, "validation_path": held["webdataset_path"]}
    with pytest.raises(ConfigError, match="validation_path: its samples need a cache of letters") as error:
        train(given, caches=[texts])
    assert f"webdataset_path={held['webdataset_path']}" in told_command(str(error.value))
    texts_held = make(settings | held, tmp_path, "held_texts", "--features", "texts")
    names, found = built(given, experiment_id="texts", caches=[texts], validation_caches=[texts_held])
    assert (names, found) == ({"generator", "squeeze"}, pytest.approx(expected, rel=1e-5))
    latents_held = make(settings | held, tmp_path, "held_latents", "--features", "latents")
    alone = {key: value for key, value in given.items() if not key.endswith("_path") or key[0] not in "wv"}
    names, found = built(
        alone, experiment_id="both", caches=[latents, texts], validation_caches=[latents_held, texts_held]
    )
    assert (names, found) == ({"generator"}, pytest.approx(expected, rel=1e-5))


class TrainOnWords(TrainMadeUp):
    """Reads a vector for each word, so that captions differ in length."""

    features = TrainMadeUp.features | {"letters": Feature("text", CAPTION_SETTINGS[:1], variable_length=True)}

    def text_features(self, encoder, captions):
        words = [encoder(caption.split() or [""]).float() for caption in captions]
        lengths = torch.tensor([len(one) for one in words])
        return {"letters": pad_sequence(words, batch_first=True), "letters_lengths": lengths}

    def encode(self, batch, random):
        latents, words = self.picture_features(batch, random)["latent"], stored(batch, "letters")
        lengths = stored(batch, lengths_name("letters"))
        if words is None:
            made = self.text_conditions(batch.captions)
            words, lengths = made["letters"], made["letters_lengths"]
        kept = torch.arange(words.shape[1]) < lengths[:, None]
        assert (words[~kept] == 0).all()
        assert lengths.tolist() == [len(caption.split()) for caption in batch.captions]
        assert words.shape[1] == lengths.max()
        return latents, (words.float().sum(dim=1) / lengths[:, None])

    def sample(self, held_out):
        found = self.text_conditions([*held_out.captions, ""])
        assert found["letters_lengths"].tolist() == [*(len(caption.split()) for caption in held_out.captions), 1]
        return []


def test_features_of_variable_length_are_stored_without_padding(settings, tmp_path, monkeypatch):
    captions = {"captions_getter": ["json", "lambda j: 'word ' * (j['score'] % 4 + 1)"]}
    given = settings | captions
    monkeypatch.setattr(cache, "use_case", lambda script: TrainOnWords)
    texts = make(given, tmp_path, "texts", "--features", "texts")
    sizes = set()
    for tar in Path(texts).rglob("*.tar"):
        with tarfile.open(tar) as file:
            for member in file:
                if member.name.endswith("letters.npy"):
                    sizes.add(np.load(io.BytesIO(file.extractfile(member).read())).shape)
    assert sizes == {(length, 8) for length in (1, 2, 3, 4)}

    def run(**changes) -> list[float]:
        one = TrainOnWords(make_config(MadeUpConfig, given | changes))
        assert one.run() == 0
        return losses(read_metrics(given | changes))

    expected = run()
    assert run(experiment_id="cached", caches=[texts]) == pytest.approx(expected, rel=1e-5)
    assert run(experiment_id="remembered", cache_text=True) == pytest.approx(expected, rel=1e-5)
    Path(texts, "prompts.safetensors").unlink()
    assert run(experiment_id="lacking", caches=[texts]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_ten_pictures_added_to_ten_thousand_cause_ten_encodings(settings, tmp_path, monkeypatch):
    pictures = tmp_path / "many" / "a.tar"
    write_shard(pictures, 10_000)
    encoded = counted(monkeypatch)
    given = settings | {"webdataset_path": str(pictures.parent)}
    make(given, tmp_path, "cache")
    assert encoded == {"pictures": 10_000, "captions": 10_000}
    encoded.clear()
    write_shard(pictures, 10_010)
    make(given, tmp_path, "cache")
    assert encoded == {"pictures": 10, "captions": 10}
