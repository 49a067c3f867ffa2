"""Members of a sample may lie in further tars, which mirror those of the data set."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.warpcore.data.tars import catalog_of, write_shard, write_tar
from warpcore.data.buckets import Buckets
from warpcore.data.captions import CaptionGetter
from warpcore.data.catalog import Catalog, open_catalog
from warpcore.data.fields import TensorField
from warpcore.data.joined import FurtherTars, join
from warpcore.data.plan import Plan, describe_difference
from warpcore.data.reader import Reader
from warpcore.data.shards import resolve_sources
from warpcore.errors import UserError

COUNT = 6
BUCKETS = Buckets.for_image_size(8, (), 8)
CAPTIONS = CaptionGetter.parse(["txt", "lambda t: t"])


def write_features(path: Path, numbers: list[int], name: str = "code") -> Path:
    """A tar that holds a tensor for each sample, its number; none for the sample 3."""
    members = []
    for number in numbers:
        content = io.BytesIO()
        np.save(content, np.full(2, number, np.float32))
        members.append((f"{number:06d}.picture.json", json.dumps({"width": 16, "height": 12}).encode()))
        if number != 3:
            members.append((f"{number:06d}.{name}.npy", content.getvalue()))
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, members)


@pytest.fixture
def data(tmp_path) -> Path:
    for folder, first in (("one", 0), ("two", COUNT)):
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        write_shard(tmp_path / "pictures" / folder / "0.tar", COUNT, first)
        write_features(tmp_path / "codes" / folder / "0.tar", [*range(first, first + COUNT)])
    return tmp_path


def joined(data: Path, *, pictures: str = "pictures", codes: str = "codes", name: str = "code") -> Catalog:
    further = FurtherTars(str(data / codes), frozenset({f"{name}.npy"}), "run the tool again")
    opened = open_catalog(resolve_sources(further.folder), keep_copies=True)
    return join(catalog_of(data / pictures), [(further, opened)])


def plan_of(catalog: Catalog, **settings) -> Plan:
    return Plan(catalog, micro_batch_size=4, buckets=BUCKETS, captions=CAPTIONS,
                required_members=["code.npy"], **settings)  # fmt: skip


def batches(plan: Plan, count: int, **position):
    reader = Reader(captions=CAPTIONS, extra={"code": TensorField("code", {(8, 8): (2,)})})
    micro_batches = plan.micro_batches(**position)
    return [reader.__getitems__(next(micro_batches)) for _ in range(count)]


def test_samples_have_the_members_of_both(data):
    plan = plan_of(joined(data), validation_samples=2)
    assert (plan.survey.passed, plan.survey.rejected["no .code.npy"]) == (2 * COUNT - 3, 1)
    found = batches(plan, 6)
    for batch in found:
        numbers = torch.tensor([int(key) for key in batch.keys])
        assert torch.equal(batch.extra["code"], numbers[:, None].expand(-1, 2).float())
        assert batch.captions == [f"caption {number}" for number in numbers.tolist()]
        assert batch.images.shape[2:] == (8, 8)
    assert len({key for batch in found for key in batch.keys}) == 2 * COUNT - 3
    going_on = batches(plan, 2, start=4, lane_states={0: found[3].state})
    assert [batch.keys for batch in going_on] == [batch.keys for batch in found[4:]]


def test_rows_are_those_of_the_pictures_alone(data):
    """A joined tar changes no draw: the same samples come in the same order."""
    (data / "codes" / "one" / "0.tar").unlink()
    write_features(data / "codes" / "one" / "0.tar", [0, 1, 2, 33, 4, 5])
    with pytest.raises(UserError, match=r"holds '000033' where .*holds '000003': run the tool again"):
        batches(plan_of(joined(data)), 1)
    plain = Plan(catalog_of(data / "pictures"), micro_batch_size=4, buckets=BUCKETS)
    alike = Plan(joined(data, codes="pictures", name="txt"), micro_batch_size=4, buckets=BUCKETS)
    for one, other, _ in zip(plain.micro_batches(), alike.micro_batches(), range(4), strict=False):
        assert [sample.seed for sample in one.samples] == [sample.seed for sample in other.samples]


def test_tars_match_by_their_names(data):
    assert len(joined(data, pictures="pictures/one")) == 1, "by its end, one/0.tar"
    assert len(joined(data, codes="codes/two", pictures="pictures/two")) == 1
    with pytest.raises(UserError, match="codes/two lacks 12 of 12 samples"):
        joined(data, codes="codes/two")  # 0.tar may be either
    (data / "codes" / "one" / "0.tar").unlink()
    with pytest.raises(UserError, match=r"codes lacks 6 of 12 samples, of .*pictures/one/0.tar: run the tool"):
        joined(data)


def test_what_lacks_rows_is_refused(data):
    write_shard(data / "pictures" / "two" / "0.tar", COUNT + 2, COUNT)
    with pytest.raises(UserError, match=r"lacks 2 of 14 samples, of .*pictures/two/0.tar: run the tool again"):
        joined(data)
    write_shard(data / "pictures" / "two" / "0.tar", COUNT - 2, COUNT)
    with pytest.raises(UserError, match="has samples that are gone"):
        joined(data)


def test_a_change_of_the_further_tars_is_a_change_of_the_data(data):
    before, pictures = plan_of(joined(data)).fingerprint, catalog_of(data / "pictures")
    assert "joined" not in pictures.fingerprint()
    write_features(data / "codes" / "two" / "0.tar", [*range(COUNT, COUNT * 2 - 1), 99])
    now = plan_of(joined(data)).fingerprint
    assert "of the tars with code.npy: shard two/0.tar changed" in describe_difference(before, now)
    assert describe_difference(before, json.loads(json.dumps(before))) is None
