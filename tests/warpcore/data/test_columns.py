"""Index columns of a batch: their values and types, and what is said where a sample lacks one."""

import json
from itertools import islice

import pytest
import torch

from tests.warpcore.data.tars import catalog_of, picture, write_tar
from tests.warpcore.runs import numbers, tiny_settings, train_here
from tests.warpcore.tiny import Denoiser
from warpcore.data.buckets import Buckets
from warpcore.data.captions import CaptionGetter
from warpcore.data.columns import column_types, tensor_types
from warpcore.data.loader import Loader
from warpcore.data.plan import Plan
from warpcore.data.reader import Reader
from warpcore.errors import UserError

NAMES = ("score", "class", "liked", "width", "height")
SHARDS = (
    [{"score": i, "class": i, "liked": i % 2 == 0, "title": f"t{i}", "tags": []} for i in range(5)],
    [{"score": i / 4, "class": i, "liked": False, "title": f"t{i}", "tags": []} for i in range(5, 12)],
)
FIELDS = {f"{fields['class']:04d}": fields for shard in SHARDS for fields in shard}


def write(folder, shards=SHARDS):
    folder.mkdir(exist_ok=True)
    for number, shard in enumerate(shards):
        members = []
        for fields in shard:
            key = f"{fields['class']:04d}"
            content = {"jpg": picture(16 + fields["class"], 12), "json": json.dumps(fields).encode(), "txt": b"a"}
            members += [(f"{key}.{extension}", data) for extension, data in content.items()]
        write_tar(folder / f"{number}.tar", members)
    return folder


@pytest.fixture(scope="module")
def catalog(tmp_path_factory):
    return catalog_of(write(tmp_path_factory.mktemp("columns")))


def plan_of(catalog, names=NAMES, **settings) -> tuple[Plan, Reader]:
    types = column_types(catalog, names)
    plan = Plan(catalog, micro_batch_size=2, buckets=Buckets(16 * 16, 4, [1, 2]), columns=types, **settings)
    return plan, Reader(columns=tensor_types(types, names))


def check(batch) -> None:
    assert {name: values.dtype for name, values in batch.columns.items()} == {
        "score": torch.float32, "class": torch.int64, "liked": torch.bool, "width": torch.int64, "height": torch.int64,
    }  # fmt: skip
    for place, key in enumerate(batch.keys):
        expected = FIELDS[key] | {"width": 16 + FIELDS[key]["class"], "height": 12}
        assert {name: values[place].item() for name, values in batch.columns.items()} == {
            n: expected[n] for n in NAMES
        }


def test_batches_hold_the_values_of_their_samples(catalog):
    plan, reader = plan_of(catalog, validation_samples=3)
    for micro_batch in [*islice(plan.micro_batches(), 20), *plan.validation()]:
        check(reader.__getitems__(micro_batch))


def test_a_sample_that_replaces_another_brings_its_own_values(catalog):
    plan, reader = plan_of(catalog)
    micro_batch = next(plan.micro_batches())
    spoilt = micro_batch.samples[0].members | {"jpg": (0, 20)}
    object.__setattr__(micro_batch.samples[0], "members", spoilt)
    batch = reader.__getitems__(micro_batch)
    assert batch.keys[0] == batch.keys[1]
    check(batch)


def test_rows_that_wait_in_a_checkpoint_keep_their_values(catalog):
    plan, reader = plan_of(catalog)
    first = list(islice(plan.micro_batches(), 3))
    assert first[-1].state["waiting"]
    resumed = plan.micro_batches(start=3, lane_states={0: first[-1].state})
    expected = plan.micro_batches(start=3)
    for micro_batch, other in islice(zip(resumed, expected, strict=True), 5):
        assert micro_batch.samples == other.samples
        check(reader.__getitems__(micro_batch))


def test_columns_change_neither_the_order_of_samples_nor_the_fingerprint(catalog):
    (plan, _), plain = plan_of(catalog), Plan(catalog, micro_batch_size=2, buckets=Buckets(16 * 16, 4, [1, 2]))
    assert plan.fingerprint == plain.fingerprint
    for one, other in islice(zip(plan.micro_batches(), plain.micro_batches(), strict=True), 10):
        assert [(sample.key, sample.seed) for sample in one.samples] == [(s.key, s.seed) for s in other.samples]


@pytest.mark.integration
def test_values_come_from_worker_processes(catalog):
    plan, reader = plan_of(catalog)
    with Loader(islice(plan.micro_batches(), 8), reader, num_workers=2) as loader:
        for batch in loader:
            check(batch)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scores", r"'scores' is a field of no sample's \.json\. Did you mean 'score'\? The samples have: class"),
        ("tags", r"'tags' holds lists or mappings"),
        ("title", r"'title' holds text; a batch holds columns of numbers"),
    ],
)
def test_a_column_that_cannot_be_had_is_named(catalog, name, message):
    with pytest.raises(UserError, match=message):
        tensor_types(column_types(catalog, [name]), [name])


def test_captions_read_members_and_columns(catalog):
    getter = CaptionGetter.parse([["json.title", "json", "width", "txt"],
                                  'lambda c, j, w, t: t + c + str(w) + str(j["class"])'])  # fmt: skip
    types = column_types(catalog, getter.columns)
    plan = Plan(catalog, micro_batch_size=4, buckets=Buckets(16 * 16, 4), captions=getter, columns=types)
    batch = Reader(captions=getter).__getitems__(next(plan.micro_batches()))
    classes = [FIELDS[key]["class"] for key in batch.keys]
    assert batch.captions == [f"at{number}{16 + number}{number}" for number in classes]
    assert plan.fingerprint["captions_getter"] == [["json.title", "json", "width", "txt"], getter.expression.text]
    assert plan.survey.passed == len(FIELDS)


def test_rows_without_what_their_caption_needs_are_counted(tmp_path):
    members = []
    for number in range(6):
        members.append((f"{number}.jpg", picture()))
        members += [(f"{number}.txt", b"a")] * (number != 0)
        fields = {} if number == 1 else {"style": "oil"}
        members.append((f"{number}.json", json.dumps(fields).encode()))
    catalog = catalog_of(write_tar(tmp_path / "a.tar", members))
    getter = CaptionGetter.parse([["txt", "json.style"], "lambda t, s: t + s"])
    columns = column_types(catalog, getter.columns)
    plan = Plan(catalog, micro_batch_size=2, buckets=Buckets(16 * 16, 4), captions=getter, columns=columns)
    assert plan.survey.rejected == {"no .txt": 1, "no style in the index (captions_getter)": 1}
    reader, micro_batch = Reader(captions=getter), next(plan.micro_batches())
    assert reader.__getitems__(micro_batch).captions == ["aoil", "aoil"]
    del micro_batch.samples[0].members["txt"]
    (event,) = reader.__getitems__(micro_batch).events
    assert event.source.endswith(f"/{micro_batch.samples[0].key}.txt")
    assert event.reason.startswith("the sample has no .txt; it has: j")
    other = CaptionGetter.parse([["txt", "json"], 'lambda t, j: t + j["styles"]'])
    with pytest.raises(UserError, match=r"no sample has 'styles'\. Did you mean 'style'\?"):
        Plan(catalog, micro_batch_size=2, buckets=Buckets(16 * 16, 4), captions=other)
    with pytest.raises(UserError, match=r"'styl' is a field of no sample's \.json\. Did you mean 'style'"):
        column_types(catalog, ["styl"])


@pytest.mark.parametrize("count", [2, 7, 11])
def test_rows_that_are_held_out_are_counted_alone(tmp_path, count):
    lacking = [[{**row, "score": None} if row["class"] % 2 else row for row in shard] for shard in SHARDS]
    data = catalog_of(write(tmp_path / "data", lacking))
    plain, _ = plan_of(data, (), validation_samples=count)
    keys = [sample.key for batch in plain.validation() for sample in batch.samples]
    found = plan_of(data, ("score",), validation_samples=count)[0].validation_survey
    assert found.passed == found.rows == len(keys) == count
    assert found.missing["score"] == sum(int(key) % 2 for key in keys)


class Sees(Denoiser):
    """Notes what it is given."""

    def encode(self, batch, random):
        for key, score in zip(batch.keys, batch.columns["score"].tolist(), strict=True):
            assert score == FIELDS[key]["score"]
        type(self).seen |= set(batch.keys)
        return super().encode(batch, random)


@pytest.mark.integration
def test_a_use_case_gets_columns_and_learns_how_many_samples_lack_one(tmp_path):
    data = write(tmp_path / "data")
    settings = tiny_settings(tmp_path, data, columns=["score"], updates=6, save_every=6, validation_samples=2)
    Sees.seen = set()
    status, lines = train_here(settings, Sees)
    assert status == 0
    assert Sees.seen == set(FIELDS)
    _, plain = train_here(settings | {"columns": [], "experiment_id": "plain"})
    assert numbers(lines) == numbers(plain)

    without = [[{**fields, "score": None} if fields["class"] in (1, 3) else fields for fields in SHARDS[0]], SHARDS[1]]
    lacking = settings | {"webdataset_path": str(write(tmp_path / "lacking", without)), "experiment_id": "lacking"}
    with pytest.raises(
        UserError, match=r"columns: 2 of 12 training samples have no 'score'.*dataset_filters: \[\['sc"
    ):
        train_here(lacking | {"validation_samples": 0}, Sees)
    with pytest.raises(UserError, match=r"columns: 2 of 12 validation samples have no 'score'"):
        train_here(
            settings
            | {"validation_samples": 0, "validation_path": lacking["webdataset_path"], "experiment_id": "held"},
            Sees,
        )
    filtered = lacking | {"dataset_filters": [["score", "lambda value: True"]], "validation_samples": 0}
    assert train_here(filtered, Sees)[0] == 0
