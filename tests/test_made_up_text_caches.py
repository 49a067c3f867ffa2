"""Caches of texts alone: made without pictures and their networks, in good batches, for pictures of any size."""

from pathlib import Path

import pytest

from families.common.features import Origin
from tests.made_up_family.train_made_up import TrainMadeUp
from tests.test_made_up_caches import edit, make
from tests.test_made_up_caches import of_family as of_family
from tests.test_made_up_caches import settings as settings
from tests.test_made_up_family import _known as _known
from tests.test_made_up_family import train
from tests.warpcore.runs import write_shard

pytestmark = pytest.mark.integration


def test_captions_of_all_sizes_of_pictures_are_encoded_together_by_their_length(settings, tmp_path, monkeypatch):
    for number, size in enumerate(((16, 16), (16, 32), (32, 16))):
        write_shard(tmp_path / "more" / f"{number}.tar", 12 * number + 6, size, 0)
    tars = [str(tmp_path / "more" / f"{number}.tar") for number in range(3)]
    plain, seen = TrainMadeUp.text_features, []
    monkeypatch.setattr(TrainMadeUp, "text_features", lambda *args: seen.append(list(args[2])) or plain(*args))
    make(settings | {"webdataset_path": tars}, tmp_path, "texts", "--features", "texts", "--batch-size", "8")
    encoded = [captions for captions in seen if len(captions) > 1]
    assert sum(map(len, encoded)) == 6 + 18 + 30
    for captions in encoded:
        lengths = [len(caption) for caption in captions]
        assert lengths == sorted(lengths)
    assert len(encoded) == 1 + 3 + 4


def test_texts_need_neither_pictures_nor_an_autoencoder_and_are_encoded_again_where_they_changed(
    settings, tmp_path, monkeypatch
):
    given = settings | {"squeeze_path": str(tmp_path / "none.safetensors")}
    monkeypatch.setattr(TrainMadeUp, "bucket_factor", property(lambda self: pytest.fail("the autoencoder was asked")))
    monkeypatch.setattr("warpcore.data.images.decode", lambda *_, **__: pytest.fail("a picture was decoded"))
    texts = make(given, tmp_path, "texts", "--features", "texts")
    edit(Path(settings["webdataset_path"], "two", "a.tar"), b"picture 7", b"pictures!")
    plain, encoded = TrainMadeUp.text_features, []
    monkeypatch.setattr(TrainMadeUp, "text_features", lambda *args: encoded.extend(args[2]) or plain(*args))
    assert make(given, tmp_path, "texts", "--features", "texts") == texts
    assert [caption for caption in encoded if caption.startswith("picture")] == ["pictures!"]


def test_texts_fit_pictures_of_any_size(settings, tmp_path):
    texts = make(settings, tmp_path, "texts", "--features", "texts")
    assert train(settings, caches=[texts], experiment_id="larger", image_size=32)
    (field,) = Origin.read(texts).fields(["letters"]).values()
    assert field.blank((999, 999)).shape == (8,)
