"""The page of a data set shows what training does with it, and whatever is in it stays text."""

import base64
import http.client
import io
import json
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from families.common.captions import cut_places
from families.common.features import Origin
from modules.tokenizers import BytePairTokenizer, WordTokenizer
from tests.clips import write_clips
from tests.s3_server import bucket as bucket
from tests.s3_server import s3_endpoint as s3_endpoint
from tests.warpcore.data.tars import catalog_of, write_tar
from tools import dataset_rows, dataset_training, inspect_dataset
from tools.dataset_rows import MAX_TEXT
from tools.index_dataset import index_dataset
from tools.near_duplicates import MOST_BITS, Fingerprint, duplicates, fingerprint, look_alike
from train.train_c import TrainStageC
from warpcore.config import make_config
from warpcore.data.buckets import Buckets
from warpcore.data.captions import CaptionGetter
from warpcore.data.filters import Filter
from warpcore.data.plan import Plan
from warpcore.data.reader import Reader
from warpcore.errors import UserError

TRAIN_C = Path(inspect_dataset.__file__).parents[1] / "train/train_c.py"
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
CLIPS = ["image_size=64", "multi_aspect_ratio=null"]
KEYS = ["image_size=64", "multi_aspect_ratio=[1/1, 1/2]"]


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def places(width: int, height: int) -> np.ndarray:
    """A picture whose red says how far to the right a pixel is, and its green how far down."""
    x, y = (np.linspace(0, 255, side).round() for side in (width, height))
    return np.stack([*np.meshgrid(x, y), np.full((height, width), 128)], axis=-1).astype(np.uint8)


def write_samples(path: Path, samples: dict[str, dict]) -> Path:
    """A tar of samples by key: `picture` (bytes), and perhaps `txt`, `json`, `mask`."""
    members = []
    for key, one in samples.items():
        members += [(f"{key}.png", one["picture"])] if "picture" in one else []
        members += [(f"{key}.txt", one["txt"].encode())] if "txt" in one else []
        members += [(f"{key}.json", json.dumps(one["json"]).encode())] if "json" in one else []
        members += [(f"{key}.mask.png", one["mask"])] if "mask" in one else []
    return write_tar(path, members)


def page_of(*arguments: object, out: Path) -> dict:
    """The data in a page that the command writes."""
    inspect_dataset.main([*map(str, arguments), "--overwrite"])
    page = out.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])


def pixels_of(uri: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


@pytest.fixture
def data(tmp_path) -> Path:
    """A tar with samples that training draws, and some that it does not, each for another reason."""
    samples = {}
    for i in range(12):
        width, height = ((96, 96), (200, 100), (40, 80))[i % 3]
        about = {"score": i, "style": f"style {i % 2}"} if i != 7 else {"style": "no score"}
        samples[f"s{i:02d}"] = {"picture": encoded(places(width, height)), "txt": f"caption {i}", "json": about}
    samples["broken"] = {"picture": b"no picture", "txt": "x", "json": {"score": 9}}
    samples["silent"] = {"picture": encoded(places(64, 64)), "json": {"score": 9}}
    samples["<b>odd</b>"] = {"picture": encoded(places(64, 64)), "txt": HOSTILE, "json": {HOSTILE: 1, "score": 9}}
    return write_samples(tmp_path / "data.tar", samples)


def test_rows_are_left_out_for_the_reasons_that_training_reports(data, tmp_path):
    out = tmp_path / "page.html"
    found = page_of(data, out, *KEYS, "dataset_filters=[[score, 'lambda s: s > 3']]", out=out)
    assert any("would cut off were not looked for" in line for line in found["told"])
    filters = [Filter.parse(["score", "lambda s: s > 3"])]
    plan = Plan(catalog_of(data), micro_batch_size=1, buckets=Buckets.for_image_size(64, (1, 0.5)), filters=filters,
                captions=CaptionGetter.parse(["txt", "identity"]))  # fmt: skip
    assert {one["reason"]: one["count"] for one in found["left_out"]} == dict(plan.survey.rejected)
    rows, state = found["rows"], found["rows"]["texts"]["state"]
    told = dict(zip(rows["key"], (state[number] for number in rows["state"]), strict=True))
    few, absent = "['score', 'lambda s: s > 3']", "['score', 'lambda s: s > 3'] (value missing)"
    expected = {f"s{i:02d}": few if i <= 3 else absent if i == 7 else "drawn" for i in range(12)}
    assert told == expected | {"broken": "undecodable picture", "silent": "no .txt", "<b>odd</b>": "drawn"}
    shown = {rows["key"][example["row"]]: example for one in found["left_out"] for example in one["examples"]}
    assert shown.keys() == told.keys() - {key for key, why in told.items() if why == "drawn"}
    assert "problem" in shown["broken"]
    assert pixels_of(shown["s01"]["whole"]).shape == (80, 160, 3)
    bars = {one["name"]: one for one in found["histograms"]}
    assert bars["score"]["absent"] == 1
    assert sum(every for _, every, _ in bars["score"]["bars"]) == 14
    assert sum(drawn for *_, drawn in bars["score"]["bars"]) == 8
    assert {one["name"]: one["draws"] for one in found["buckets"]} == {"32x64": 2, "64x64": 3, "64x32": 3}


def test_crops_are_those_of_the_loader(data, tmp_path):
    out = tmp_path / "page.html"
    found = page_of(data, out, *KEYS, "crop_mode=random", out=out)
    plan = Plan(
        catalog_of(data), micro_batch_size=1, buckets=Buckets.for_image_size(64, (1, 0.5), 32),
        captions=CaptionGetter.parse(["txt", "identity"]),
    )  # fmt: skip
    reader, loaded = Reader(crop="random", geometry=True), {}
    for micro_batch, _ in zip(plan.micro_batches(), range(plan.num_rows), strict=False):
        batch = reader.__getitems__(micro_batch)
        loaded[batch.keys[0]] = batch
    assert len(found["samples"]) == len(loaded) == 13
    for sample in found["samples"]:
        batch = loaded[found["rows"]["key"][sample["row"]]]
        geometry = batch.geometry
        (top, left), size = geometry.crop[0].tolist(), geometry.size[0].tolist()
        height, width = geometry.resized[0].tolist()
        expected = [left / width, top / height, (left + size[1]) / width, (top + size[0]) / height]
        assert sample["box"] == pytest.approx(expected, abs=1e-3)
        assert found["rows"]["texts"]["bucket"][found["rows"]["bucket"][sample["row"]]] == f"{size[0]}x{size[1]}"
        crop = pixels_of(sample["crop"]).astype(float)
        assert np.abs(crop - batch.images[0].permute(1, 2, 0).numpy()).mean() < 6
        assert crop[..., 0].mean() / 255 == pytest.approx((expected[0] + expected[2]) / 2, abs=0.03)
        assert crop[..., 1].mean() / 255 == pytest.approx((expected[1] + expected[3]) / 2, abs=0.03)
        kept = found["rows"]["kept"][sample["row"]]
        assert kept == pytest.approx((expected[2] - expected[0]) * (expected[3] - expected[1]), abs=1e-3)
        enlarged = found["rows"]["scale"][sample["row"]]
        assert enlarged == pytest.approx(height / geometry.source[0, 0].item(), abs=1e-3)


def test_masks_are_shown_with_the_crop_of_their_pictures(tmp_path):
    white = np.zeros((50, 100), np.uint8)
    white[:, :50] = 255
    samples = {f"{i}": {"picture": encoded(places(200, 100)), "txt": "x", "mask": encoded(white)} for i in range(6)}
    out = tmp_path / "page.html"
    found = page_of(
        write_samples(tmp_path / "a.tar", samples), out, "image_size=64", "multi_aspect_ratio=null", out=out
    )
    assert len(found["samples"]) == 6
    for sample in found["samples"]:
        red, mask = (pixels_of(uri)[..., 0] for uri in (sample["crop"], sample["beside"]["mask"]))
        assert ((mask > 127) == (red < 127.5)).mean() > 0.95


def test_pictures_that_look_the_same_are_found(tmp_path):
    random = np.random.default_rng(0)
    several = [
        np.kron(random.integers(0, 256, (6, 6, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8)) for _ in "abc"
    ]
    again = np.array(Image.fromarray(several[0]).resize((80, 80)))
    pictures = {
        "one": encoded(several[0]), "two": encoded(several[1]), "three": encoded(several[2]),
        "copy": encoded(several[0]), "worse": encoded(again, "JPEG", quality=60),
        "other colours": encoded(several[0][..., ::-1] // 2), "wide": encoded(several[0][:48]),
    }  # fmt: skip
    samples = {key: {"picture": content, "txt": key} for key, content in pictures.items()}
    out = tmp_path / "page.html"
    found = page_of(write_samples(tmp_path / "a.tar", samples), out, *KEYS, out=out)
    groups = [{found["rows"]["key"][row] for row in group} for group in found["duplicates"]]
    assert groups == [{"one", "copy", "worse"}]


def test_duplicates_are_those_of_comparing_all_with_all():
    random = np.random.default_rng(1)
    grey = random.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    prints = []
    for one in grey:
        bits = random.random(128) < 0.5
        for changed in (0, 3, MOST_BITS, MOST_BITS + 1, 30):
            flipped = bits.copy()
            flipped[random.choice(128, changed, replace=False)] ^= True
            prints.append(Fingerprint(flipped, one, 1.0))
    prints += [fingerprint(np.full((8, 8, 3), colour, np.uint8), 1.0) for colour in range(0, 250, 40)]
    group = {i: {i} for i in range(len(prints))}
    for i in range(len(prints)):
        for j in range(i):
            if look_alike(prints[i], prints[j]) and group[i] is not group[j]:
                joined = group[i] | group[j]
                group |= dict.fromkeys(joined, joined)
    expected = {frozenset(one) for one in group.values() if len(one) > 1}
    assert expected
    assert {frozenset(one) for one in duplicates(prints)} == expected


@pytest.mark.parametrize("tokenizer", [WordTokenizer(["a", "cat"]), BytePairTokenizer()], ids=["words", "CLIP"])
def test_a_caption_is_cut_behind_the_last_token_that_is_read(tokenizer):
    encoder = torch.nn.Module()
    encoder.tokenizer, encoder.length = tokenizer, 7
    texts = ["a cat", "a cat, a cat", "a cat, a cat, a cat", "", "\U0001f98a" * 9]
    found = cut_places(encoder, texts)
    assert found[:2] == [None, None]
    assert found[3] is None
    assert texts[2][: found[2]].rstrip() == "a cat, a cat"[: len(texts[2][: found[2]].rstrip())]
    for text, place in zip(texts, found, strict=True):
        if place is not None:
            assert len(tokenizer.encode(text[:place])) <= 5 < len(tokenizer.encode(text[: place + 1]))


@pytest.mark.integration
def test_samples_are_those_that_a_run_learns(small_cascade, tmp_path):
    """Captions with templates, shuffling and dropout, and pictures, as the updates of a training get them."""
    samples = {
        f"{i}": {"picture": encoded(places(100, 64 + i)), "txt": "w1, w2, w3, w4, w5, w6", "json": {}}
        for i in range(6)
    }
    settings = small_cascade | {
        "webdataset_path": str(write_samples(tmp_path / "a.tar", samples)), "validation_samples": 0, "batch_size": 1,
        "caption_templates": ["picture {caption}", "{caption}"], "shuffle_tags": True, "caption_dropout": 0.3,
        "updates": 6, "crop_mode": "random", "checkpoint_path": str(tmp_path / "runs"),
    }  # fmt: skip
    settings.pop("micro_batch_size", None)
    read = {}

    class Recorded(TrainStageC):
        def encode(self, batch, random):
            self.seen = batch
            return super().encode(batch, random)

        def text_conditions(self, captions):
            if hasattr(self, "seen"):  # the texts that are encoded for an update: "" for one that is left out
                read.setdefault(self.seen.keys[0], (captions[0], self.seen.images[0]))
            return super().text_conditions(captions)

    assert Recorded(make_config(TrainStageC.Config, settings)).run() == 0
    config, out = tmp_path / "config.yaml", tmp_path / "page.html"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    found = page_of(TRAIN_C, config, out, out=out)
    assert len(read) == len(found["samples"]) == 6
    cut = {one["row"]: one["place"] for one in found["cut"]}
    for sample in found["samples"]:
        row = sample["row"]
        caption, pixels = read[found["rows"]["key"][row]]
        shown = found["rows"]["caption"][row]
        assert caption == ("" if row in found["dropped"] else shown)
        assert np.abs(pixels_of(sample["crop"]) - pixels.permute(1, 2, 0).float().numpy()).mean() < 6
        words = list(re.finditer(r"\w+|[^\w\s]", shown))  # the tower reads 6 of them, beside begin and end
        assert row in found["dropped"] or words[5].end() <= cut[row] <= words[6].start()
    assert 0 < len(found["dropped"]) < 6


def test_a_clip_is_shown_as_a_video(tmp_path):
    out = tmp_path / "page.html"
    found = page_of(write_clips(tmp_path / "a.tar", 3), out, *CLIPS, "num_frames=4", out=out)
    assert {sample["frames"] for sample in found["samples"]} == {4}
    assert all(sample["clip"].startswith("data:video/mp4;base64,") for sample in found["samples"])
    found = page_of(tmp_path / "a.tar", out, *CLIPS, "num_frames=6", out=out)
    assert [one["count"] for one in found["left_out"]] == [3]
    assert not found["samples"]


def test_what_is_in_the_data_stays_text(data, tmp_path):
    out = tmp_path / "page.html"
    found = page_of(data, out, *KEYS, out=out)
    assert HOSTILE in found["rows"]["caption"]
    assert HOSTILE in {one["name"] for one in found["columns"]}
    assert "<script>alert" not in out.read_text(encoding="utf-8")


def test_a_text_that_nobody_would_read_does_not_fill_the_page(tmp_path):
    out, text = tmp_path / "page.html", "word " * 20_000
    sample = {"picture": encoded(places(64, 64)), "txt": text, "json": {"told": text, "id": 2**60 + 1}}
    found = page_of(write_samples(tmp_path / "data.tar", {"a": sample}), out, *KEYS, out=out)
    assert text.startswith(found["samples"][0]["own"])
    assert len(found["samples"][0]["own"]) == len(found["rows"]["caption"][0]) == MAX_TEXT
    assert out.stat().st_size < len(text)
    assert {one["name"]: one["values"] for one in found["columns"]}["id"] == [str(2**60 + 1)]  # browsers round numbers


def test_columns_with_much_text_are_shortened_and_the_page_says_so(data, tmp_path, monkeypatch):
    out = tmp_path / "page.html"
    monkeypatch.setattr(dataset_rows, "MOST_CHARACTERS", 60)  # there are 12 texts of 7 or 8 characters
    found = page_of(data, out, *KEYS, out=out)
    columns = {one["name"]: one["values"] for one in found["columns"]}
    assert columns["style"][:2] == ["sty", "sty"]
    assert columns["score"][:2] == [0, 1]
    assert "the first 3 characters of each" in found["told"][-1]
    bars = {one["name"]: one for one in found["histograms"]}
    assert bars["style"]["bars"][0][0] == "style 0"


def test_a_cache_is_refused_and_names_its_pictures(tmp_path, small_cascade):
    origin = Origin({}, {}, {}, {}, "float32", 1, 0, {}, source="the/pictures")
    origin.write(tmp_path)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(small_cascade | {"webdataset_path": str(tmp_path)}), encoding="utf-8")
    with pytest.raises(UserError, match=r"is a cache, .* webdataset_path=the/pictures"):
        inspect_dataset.main([str(TRAIN_C), str(config), str(tmp_path / "page.html")])


@pytest.mark.integration
def test_the_page_is_served_to_this_machine_under_its_own_name_alone(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("a page", encoding="utf-8")
    with inspect_dataset.server_of(page, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert server.server_address[0] == "127.0.0.1"

        def status(path: str, host: str) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
            connection.request("GET", path, headers={"Host": host})
            answer = connection.getresponse()
            return answer.status, answer.read()

        assert status("/", f"localhost:{server.server_port}") == (200, b"a page")
        assert status("/", "another.site")[0] == status("/page.html", f"127.0.0.1:{server.server_port}")[0] == 404
        with pytest.raises(UserError, match=f"port {server.server_port} can't be used"):  # before anything is read
            inspect_dataset.main(["missing", str(tmp_path / "new.html"), "--serve", str(server.server_port)])
        server.shutdown()


@pytest.mark.integration
def test_a_data_set_on_s3_is_sampled(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_training, "REMOTE_SHARDS", 6)
    for tar in range(12):
        samples = {f"{tar}-{i}": {"picture": encoded(places(64, 64)), "txt": f"{tar} {i}"} for i in range(3)}
        write_samples(tmp_path / f"{tar:02d}.tar", samples)
        bucket.put(f"set/{tar:02d}.tar", (tmp_path / f"{tar:02d}.tar").read_bytes())
    out = tmp_path / "page.html"
    found = page_of(f"{bucket.url}/set", out, *KEYS, out=out)
    assert (found["about"]["shards"], found["about"]["looked_at"]) == (12, 4)
    assert any("2 of the tars that would have been looked at have no index" in line for line in found["told"])
    index_dataset([f"{bucket.url}/set"], num_workers=1)
    found = page_of(f"{bucket.url}/set", out, *KEYS, "--pictures", "5", out=out)
    assert [found["about"][name] for name in ("shards", "looked_at", "rows", "read", "shown")] == [12, 6, 18, 5, 5]
    assert any(line.startswith("Sampled: 6 of 12 tars") for line in found["told"])
    found = page_of(f"{bucket.url}/set", out, *KEYS, "--shards", "12", out=out)
    assert found["about"]["looked_at"] == 12
    assert not any("Sampled" in line for line in found["told"])


@pytest.mark.integration
@pytest.mark.browser
def test_the_page_filters_plays_and_answers_keys(browser, data, tmp_path):
    out = tmp_path / "page.html"
    page_of(data, out, *KEYS, "dataset_filters=[[score, 'lambda s: s > 3']]", out=out)
    tab = browser.open(f"file://{out}")
    assert tab.run("document.querySelectorAll('.card').length") == 8
    tab.run("document.getElementById('search').focus()")
    tab.run("""(() => { const box = document.getElementById("search"); box.value = "alert(1)";
               box.dispatchEvent(new Event("input", {bubbles: true})); })()""")
    tab.wait("document.querySelectorAll('.card').length === 1")
    assert tab.texts(".card .caption") == [HOSTILE]
    assert tab.texts(".card .key") == ["<b>odd</b>"]
    tab.run("""(() => { const box = document.getElementById("search"); box.value = "";
               box.dispatchEvent(new Event("input", {bubbles: true})); })()""")
    tab.wait("document.querySelectorAll('.card').length === 8")
    tab.run("document.getElementById('tab-samples').focus()")
    tab.press("ArrowRight")
    assert tab.run("document.activeElement.id") == "tab-rows"
    assert tab.run("document.querySelectorAll('#list .row').length") == 16
    tab.run("document.getElementById('list').focus()")
    tab.press("End")
    tab.press("Enter")
    assert tab.run("document.getElementById('detail').open")
    named = "document.getElementById(document.getElementById('list').getAttribute('aria-activedescendant')).innerText"
    assert tab.run(named).startswith("14")
    assert "<b>odd</b>" in tab.texts("#detail")[0]
    assert HOSTILE in tab.texts("#detail")[0]
    tab.press("Escape")
    tab.wait("!document.getElementById('detail').open")
    tab.click("#tab-leftout")
    assert len(tab.texts("main h2")) == 4
    tab.click("main h2 + button")
    tab.wait("document.getElementById('found').textContent === '4 of 15 rows'")
    for name in ("columns", "buckets", "duplicates", "problems", "samples"):
        tab.click(f"#tab-{name}")
    named = "one.getAttribute('aria-label') || one.alt || one.textContent"
    unnamed = f"[...document.querySelectorAll('button, input, select, img')].filter(one => !({named})).length"
    assert tab.run(unnamed) == 0
    tab.close()
    tab = browser.open(f"file://{out}", width=340, dark=True)
    for name in ("rows", "leftout", "columns", "buckets", "duplicates", "problems", "samples"):
        tab.click(f"#tab-{name}")
        assert tab.run("document.documentElement.scrollWidth") == 340, name
    tab.close()
    page_of(
        write_clips(tmp_path / "clips.tar", 2),
        out,
        *CLIPS,
        "num_frames=5",
        out=out,
    )
    tab = browser.open(f"file://{out}")
    tab.click("#play")
    tab.wait("[...document.querySelectorAll('video')].every(video => !video.paused && video.currentTime > 0)")
    tab.close()
