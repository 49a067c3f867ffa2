"""True sizes and crops of a batch, against the pixels of its pictures."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from tests.warpcore.data.tars import catalog_of, write_tar
from warpcore.data.buckets import Buckets
from warpcore.data.geometry import stored_geometry
from warpcore.data.images import BadPicture
from warpcore.data.plan import Plan
from warpcore.data.reader import Reader
from warpcore.errors import UserError

SIZES = ((70, 50), (50, 70), (64, 64), (120, 40))


def smooth(width: int, height: int, orientation: int) -> bytes:
    """A picture of blobs, stored turned as its EXIF orientation says."""
    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(width + orientation))
    pixels = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)[0].permute(1, 2, 0)
    exif, content = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray((pixels * 255).byte().numpy()).save(content, "PNG", exif=exif)
    return content.getvalue()


@pytest.fixture(scope="module")
def pictures():
    return {f"{i:03d}": smooth(*SIZES[i % 4], orientation=1 + i % 8) for i in range(16)}


@pytest.fixture(scope="module")
def catalog(pictures, tmp_path_factory):
    folder = tmp_path_factory.mktemp("geometry")
    write_tar(folder / "a.tar", [(f"{key}.png", content) for key, content in pictures.items()])
    return catalog_of(folder)


@pytest.mark.parametrize("crop", ["center", "random", "smart"])
def test_cropping_by_these_numbers_gives_the_pictures_of_the_batch(catalog, pictures, crop):
    plan = Plan(catalog, micro_batch_size=4, buckets=Buckets(32 * 32, 8, [1, 3 / 4, 2]), validation_samples=15)
    reader, corners = Reader(crop=crop, geometry=True), set()
    for micro_batch in plan.validation():
        batch = reader.__getitems__(micro_batch)
        for place, key in enumerate(batch.keys):
            picture = ImageOps.exif_transpose(Image.open(io.BytesIO(pictures[key])))
            whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
            geometry = batch.geometry
            assert geometry.source[place].tolist() == list(whole.shape[2:])
            assert geometry.size[place].tolist() == list(batch.size)
            resized = F.interpolate(whole, geometry.resized[place].tolist(), mode="bilinear", antialias=True)[0]
            top, left = geometry.crop[place].tolist()
            cropped = resized[:, top : top + batch.size[0], left : left + batch.size[1]]
            assert (cropped - batch.images[place].float()).abs().max() < 1.6
            corners.add((top, left))
    assert len(corners) >= 3


def test_a_batch_without_a_readable_picture_has_numbers_too(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", smooth(70, 50, 1)), ("1.png", smooth(70, 50, 1)[:300])])
    plan = Plan(catalog_of(tmp_path), micro_batch_size=1, buckets=Buckets(32 * 32, 8), validation_samples=1)
    micro_batch = next(plan.micro_batches())
    object.__setattr__(micro_batch.samples[0], "members", {"png": (0, 10)})
    batch = Reader(geometry=True).__getitems__(micro_batch)
    assert batch.weight == 0
    assert batch.geometry.source.tolist() == [[50, 70]]


@pytest.mark.parametrize("crops", [3, [[1]], [["1", 2]], [[-1, 2]], [[0, 2**40]], {"a": 1}])
def test_damaged_crops_of_stored_features_make_a_bad_sample(tmp_path, crops):
    facts = [json.dumps({"width": 70, "height": 50, "crops": one}).encode() for one in ([[0, 1]], crops)]
    write_tar(tmp_path / "a.tar", [(f"{number}.picture.json", one) for number, one in enumerate(facts)])
    plan = Plan(catalog_of(tmp_path), micro_batch_size=2, buckets=Buckets(32 * 32, 8))
    batch = Reader(pictures=False, geometry=True).__getitems__(next(plan.micro_batches()))
    assert [(one.source[-15:], one.reason) for one in batch.events] == [("/1.picture.json", "its crops are damaged")]
    assert batch.geometry.crop.tolist() == [[0, 1], [0, 1]]
    for damaged in (b"{", b"[]", b"[" * 100_000):
        with pytest.raises(BadPicture, match="it is damaged"):
            stored_geometry(damaged, next(plan.micro_batches()).samples[0], (32, 32), "")


def test_stored_features_without_crops_are_named(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.picture.json", json.dumps({"width": 70, "height": 50}).encode())])
    plan = Plan(catalog_of(tmp_path), micro_batch_size=1, buckets=Buckets(32 * 32, 8))
    with pytest.raises(UserError, match=r"a\.tar does not say how its pictures were cropped.*; store them"):
        Reader(pictures=False, geometry=True, geometry_remedy="store them").__getitems__(next(plan.micro_batches()))
