"""A micro-batch to a batch: what is read, what replaces a bad sample, and what stops the run."""

import pickle
import subprocess
import sys
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from warpcore.data.captions import CaptionGetter
from warpcore.data.fields import BadMember, PictureField
from warpcore.data.images import decode
from warpcore.data.reader import Reader
from warpcore.data.samples import MicroBatch, Sample
from warpcore.data.storage_protocol import ChangedShardError

SIZE = (32, 48)
TXT = CaptionGetter.parse(["txt", "identity"])


def picture(shade: int, kind: str = "PNG", width: int = 80, height: int = 60) -> bytes:
    """A ramp on a shade, so that a crop shows where it was taken."""
    ramp = np.arange(width)[None, :, None] + np.zeros((height, 1, 3))
    file = BytesIO()
    Image.fromarray((shade + ramp).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def write_shard(path: Path, contents: list[dict[str, bytes]]) -> list[Sample]:
    """A file with the members one after the other, as in a tar, and its samples: keys a0, a1, ..., seeds 100, ..."""
    samples = []
    with path.open("wb") as file:
        for number, members in enumerate(contents):
            spans = {}
            for suffix, data in members.items():
                file.write(bytes(512))
                spans[suffix] = (file.tell(), len(data))
                file.write(data)
            samples.append(Sample(str(path), f"a{number}", spans, 80, 60, 100 + number))
    return samples


def micro_batch(samples: list[Sample], number: int = 7) -> MicroBatch:
    return MicroBatch(number, SIZE, tuple(samples), 3, {"cursor": 5}, 2, ("a note",))


def good(number: int) -> dict[str, bytes]:
    return {"jpg": picture(10 * number), "txt": f"picture {number}".encode()}


def test_a_batch_holds_the_samples_in_order_and_what_the_plan_says_of_them(tmp_path):
    one = write_shard(tmp_path / "one.tar", [good(0), good(1)])
    two = write_shard(tmp_path / "two.tar", [good(2), {"WEBP": picture(30, "WEBP"), "txt": " sömething ".encode()}])
    batch = Reader(captions=TXT).__getitems__(micro_batch([two[1], one[0], two[0], one[1]]))
    assert (batch.number, batch.size, batch.lane, batch.state, batch.epoch) == (7, SIZE, 3, {"cursor": 5}, 2)
    assert batch.notes == ("a note",)
    assert batch.captions == ["sömething", "picture 0", "picture 2", "picture 1"]
    assert batch.keys == ["a1", "a0", "a0", "a1"]
    assert batch.seeds == [101, 100, 100, 101]
    assert (batch.weight, batch.events) == (1.0, [])
    assert batch.images.shape == (4, 3, *SIZE)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for image, shade in zip(batch.images[1:], (0, 20, 10), strict=True):
        expected = decode(picture(shade), SIZE).pixels
        assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(expected.copy()))


BAD = {
    "cut off": ({"jpg": picture(5, "JPEG")[:-20], "txt": b"x"}, ".jpg", "cut off"),
    "no picture in it": ({"jpg": b"<html>", "txt": b"x"}, ".jpg", "no picture in a known format"),
    "bomb": ({"jpg": picture(5, width=400, height=400), "txt": b"x"}, ".jpg", "more than the limit"),
    "not text": ({"jpg": picture(5), "txt": b"\xff\xfe\x9f"}, ".txt", "not UTF-8"),
    "no caption": ({"jpg": picture(5)}, ".txt", "the sample has no .txt; it has: jpg"),
    "no picture": ({"txt": b"x", "json": b"{}"}, ".jpg", "the sample has no .jpg; it has: json, txt"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_replaced_by_the_next_readable_one_and_reported(kind, tmp_path):
    contents, suffix, reason = BAD[kind]
    samples = write_shard(tmp_path / "x.tar", [good(0), contents, contents, good(3)])
    reader = Reader(captions=TXT, max_pixels=80 * 60)
    batch = reader.__getitems__(micro_batch(samples))
    assert batch.keys == ["a0", "a3", "a3", "a3"]
    assert batch.captions == ["picture 0", "picture 3", "picture 3", "picture 3"]
    assert batch.seeds == [100, 103, 103, 103]
    assert torch.equal(batch.images[1], batch.images[3])
    assert not torch.equal(batch.images[0], batch.images[3])
    assert batch.weight == 1.0
    assert [event.source for event in batch.events] == [f"{tmp_path}/x.tar/a{n}{suffix}" for n in (1, 2)]
    assert reason in batch.events[0].reason
    assert [event.place for event in batch.events] == [1, 2]
    around = reader.__getitems__(micro_batch([samples[0], samples[3], samples[1]]))
    assert around.keys == ["a0", "a3", "a0"], "after the last sample comes the first"


def test_a_bad_json_caption_is_a_bad_sample(tmp_path):
    captions = CaptionGetter.parse(["json", 'lambda j: j["caption"]'])
    contents = [
        {"jpg": picture(1), "json": text}
        for text in (b'{"caption": "yes"}', b"{", b'{"label": 3}', b'{"caption": null}')
    ]
    batch = Reader(captions=captions).__getitems__(micro_batch(write_shard(tmp_path / "x.tar", contents)))
    assert batch.captions == ["yes"] * 4
    assert [event.source[-7:] for event in batch.events] == ["a1.json", "a2.json", "a3.json"]


def test_a_micro_batch_without_a_readable_sample_weighs_nothing_and_keeps_its_shape(tmp_path):
    contents = [{"jpg": b"junk", "txt": b"x", "mask.png": picture(0)} for _ in range(3)]
    reader = Reader(captions=TXT, extra={"mask": PictureField(("mask.png",))})
    batch = reader.__getitems__(micro_batch(write_shard(tmp_path / "x.tar", contents)))
    assert batch.weight == 0.0
    assert batch.images.shape == (3, 3, *SIZE)
    assert batch.extra["mask"].shape == (3, 1, *SIZE)
    assert not batch.images.any()
    assert (batch.captions, batch.keys, len(batch.events)) == ([""] * 3, ["a0", "a1", "a2"], 3)


def test_an_io_fault_is_no_bad_sample(tmp_path):
    samples = write_shard(tmp_path / "x.tar", [good(0), good(1)])
    whole = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:-20])
    with pytest.raises(ChangedShardError, match=r"x\.tar"):
        Reader(captions=TXT).__getitems__(micro_batch(samples))
    (tmp_path / "x.tar").unlink()
    with pytest.raises(FileNotFoundError):
        Reader(captions=TXT).__getitems__(micro_batch(samples))


def test_without_pictures_only_the_captions_are_read(tmp_path):
    asked = []

    def read(url, ranges, version):
        asked.extend(ranges)
        return [Path(url).read_bytes()[offset : offset + size] for offset, size in ranges]

    samples = write_shard(tmp_path / "x.tar", [{"jpg": b"junk", "txt": b"one"}, {"jpg": b"junk", "txt": b"two"}])
    batch = Reader(captions=TXT, pictures=False, read_ranges=read).__getitems__(micro_batch(samples))
    assert (batch.images, batch.captions, batch.weight) == (None, ["one", "two"], 1.0)
    assert asked == [sample.members["txt"] for sample in samples]


@dataclass(frozen=True)
class Numbers:
    """A use case's own member: comma-separated numbers."""

    suffixes: tuple[str, ...] = ("csv",)

    def decode(self, data, geometry, sample):
        try:
            return torch.tensor([float(number) for number in data.split(b",")])
        except ValueError as error:
            raise BadMember(str(error)) from error

    def blank(self, size):
        return torch.zeros(2)


def test_further_members_come_along_and_pictures_among_them_share_the_crop(tmp_path):
    contents = [
        {
            **good(n),
            "mask.png": picture(10 * n),
            "depth.png": picture(10 * n, width=160, height=120),
            "csv": b"%d,1" % n,
        }
        for n in range(3)
    ]
    contents[1]["csv"] = b"one,two"
    reader = Reader(
        crop="random",
        extra={"mask": PictureField(("mask.png",)), "depth": PictureField(("depth.png",), 3), "numbers": Numbers()},
    )
    batch = pickle.loads(pickle.dumps(reader)).__getitems__(micro_batch(write_shard(tmp_path / "x.tar", contents)))
    assert batch.captions == ["", "", ""]
    assert torch.equal(batch.extra["mask"], batch.images[:, :1])
    assert batch.extra["depth"].shape == (3, 3, *SIZE)
    assert batch.extra["numbers"].tolist() == [[0, 1], [2, 1], [2, 1]]
    assert "a1.csv" in batch.events[0].source


def brightness(batch):
    return batch.images.float().mean(dim=(1, 2, 3)) + batch.extra["mask"].float().mean() + sum(batch.seeds)


def test_workers_compute_of_the_whole_batch_and_say_how_long_it_took(tmp_path):
    contents = [{**good(n), "mask.png": picture(10 * n)} for n in range(3)]
    contents[1] = {"jpg": b"junk", "txt": b"x", "mask.png": picture(0)}
    reader = Reader(extra={"mask": PictureField(("mask.png",))}, computed={"brightness": brightness})
    batch = pickle.loads(pickle.dumps(reader)).__getitems__(micro_batch(write_shard(tmp_path / "x.tar", contents)))
    assert torch.equal(batch.extra["brightness"], brightness(batch)), "replacements are in their places already"
    assert list(batch.milliseconds) == ["brightness (main process)"]
    assert 0 < batch.milliseconds["brightness (main process)"] < 1000
    assert len(list(batch.tensors())) == 3


def test_a_batch_moves_with_all_its_tensors(tmp_path):
    contents = [{**good(n), "csv": b"1,2"} for n in range(2)]
    batch = Reader(captions=TXT, extra={"numbers": Numbers()}).__getitems__(
        micro_batch(write_shard(tmp_path / "x.tar", contents))
    )
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in moved.tensors()} == {"meta"}
    assert len(list(moved.tensors())) == 2
    assert moved.captions == batch.captions


@pytest.mark.integration
def test_a_worker_imports_little():
    heavy = "wandb open_clip torchvision transformers pyarrow pydantic boto3 webdataset kornia"
    code = f"import sys, warpcore.data.reader; print(*(set(sys.modules) & set({heavy.split()!r})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
