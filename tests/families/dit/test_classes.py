"""Where the class of a sample comes from, and what becomes of samples without a usable one."""

import json

import pytest

from families.common.class_training import CLASS
from families.common.classes import NAMES_KEY, ClassField, class_number, names_said
from families.common.family import CLASS_TO_IMAGE
from families.common.tags import TagSettings
from families.registry import load_task
from tests.caches import make_cache
from tests.families.dit.classed import CLASSES, numbered, small_settings, write_classed
from tests.warpcore.runs import read_metrics
from train.train_dit import TrainDit
from warpcore.config import ConfigError, make_config
from warpcore.data.fields import BadMember
from warpcore.data.samples import Sample
from warpcore.errors import UserError

NAMES = ("red circle", "blue star", "7")


def sample(key: str = "n01440764/0001") -> Sample:
    return Sample("a.tar", key, {}, 8, 8, 0)


GOOD = [
    (["cls", "identity"], b"3", (), 3),
    ([".CLS", "identity"], b" 4\n", (), 4),
    (["json", "lambda j: j['label']"], b'{"label": 2}', (), 2),
    (["json", "lambda j: j['colour'] + ' ' + j['shape']"], b'{"colour": "blue", "shape": "star"}', NAMES, 1),
    (["cls", "identity"], b"7", NAMES, 2),
    (["cls", "identity"], b"1", NAMES, 1),
    (["key", "lambda k: k.split('/')[0] == 'n01440764' and 1 or 0"], b"", (), 1),
]


@pytest.mark.parametrize(("getter", "content", "names", "expected"), GOOD)
def test_the_class_is_a_number_or_a_name_in_a_member_or_the_key(getter, content, names, expected):
    field = ClassField.parse(getter, len(names) or CLASSES, names)
    assert field.decode(content, None, sample()).item() == expected


BAD = [
    (["cls", "identity"], b"5", (), r"class 5 is outside of 0 to 4 \(num_classes: 5\)"),
    (["cls", "identity"], b"-1", (), "class -1 is outside"),
    (["cls", "identity"], b"cat", (), "'cat' is no class; classes are numbers from 0 to 4"),
    (["cls", "identity"], "²".encode(), (), "is no class"),
    (["cls", "identity"], b"\xff", (), "the .cls is not UTF-8"),
    (["cls", "identity"], b"9" * 500, (), "is no class"),
    (["cls", "identity"], b"red circel", NAMES, "Did you mean 'red circle'"),
    (["json", "lambda j: j['label']"], b'{"lable": 2}', (), "KeyError"),
    (["json", "lambda j: j['label']"], b'{"label": 2.5}', (), "2.5 is no class"),
    (["json", "lambda j: j['label']"], b'{"label": true}', (), "True is no class"),
    (["json", "lambda j: j['label']"], b"[", (), "the .json is not JSON"),
]


@pytest.mark.parametrize(("getter", "content", "names", "message"), BAD)
def test_what_is_no_class_makes_a_bad_sample(getter, content, names, message):
    field = ClassField.parse(getter, len(names) or CLASSES, names)
    with pytest.raises(BadMember, match=message):
        field.decode(content, None, sample())


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"class_names": ["a", "b"], "num_classes": 3}, "2 names for 3 classes"),
     ({"class_names": ["a", "a"], "num_classes": None}, "'a' names two classes"),
     ({"sample_classes": [5]}, "sample_classes: class 5 is outside of 0 to 4"),
     ({"class_names": ["cat", "dog"], "num_classes": None, "sample_classes": ["cta"]}, "Did you mean 'cat'"),
     ({"num_classes": 0}, "num_classes")],
)  # fmt: skip
def test_keys_that_contradict_each_other_are_refused(keys, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make_config(TrainDit.Config, small_settings(tmp_path, tmp_path / "a.tar") | keys)


def test_expressions_of_several_values_and_of_code_are_refused():
    with pytest.raises(UserError, match="takes 2 values, not 1"):
        ClassField.parse(["json", "lambda a, b: a"], 3)
    with pytest.raises(UserError, match="not allowed"):
        ClassField.parse(["json", "lambda j: open(j)"], 3)


def test_names_come_before_numbers_and_say_how_many_there_are(tmp_path):
    given = small_settings(tmp_path, tmp_path / "a.tar", class_names=["cat", "dog"], sample_classes=["dog", 0])
    del given["num_classes"]
    config = make_config(TrainDit.Config, given)
    assert (config.num_classes, config.sample_numbers) == (2, [1, 0])
    assert class_number("7", 3, NAMES) == 2


def test_keys_about_captions_are_none_of_scripts_that_learn_classes():
    assert TagSettings.model_fields.keys() <= TrainDit.Config.unused


@pytest.mark.integration
def test_a_run_keeps_the_names_of_its_classes_and_files_say_them(small_mini, tmp_path, caplog):
    names = ["böxes 🎁", 'the "old" dog', "cat"]
    data = write_classed(tmp_path / "a.tar", [{"txt": names[i % 3].encode()} for i in range(6)])
    given = small_settings(tmp_path, data, class_getter=["txt", "identity"], class_names=names, num_classes=None)
    given = {key: value for key, value in given.items() if value is not None}
    run(given | {"sample_classes": ["cat"]})

    file = tmp_path / "runs" / "run" / "generator.safetensors"
    keys = {"generator_checkpoint_path": str(file), "classes": names, "device": "cpu"}
    kind, config = load_task(CLASS_TO_IMAGE, [f"{key}={value}" for key, value in keys.items()])
    assert kind(config).labels == [0, 1, 2]

    swapped = {"class_names": [names[1], names[0], names[2]], "updates": 3}
    with pytest.raises(UserError, match="has learned class 0 as 'böxes 🎁', which is 'the \"old\" dog' here"):
        run(given | swapped)
    run(given | {"updates": 3})
    assert not [record for record in caplog.records if "class_names" in record.getMessage()]
    run(given | swapped | {"experiment_id": "other", "generator_checkpoint_path": str(file)})
    assert "class_names: 'the \"old\" dog' is class 0 here and class 1 in" in caplog.text


@pytest.mark.parametrize("said", ["[", "[1]", '{"names": 1}', '{"names": [1]}'])
def test_names_in_a_damaged_file_are_refused(said):
    with pytest.raises(UserError, match="names of a"):
        names_said({NAMES_KEY: said}, "names of a")


class Seeing(TrainDit):
    seen: list

    def encode(self, batch, random):
        self.seen.append(batch)
        return super().encode(batch, random)


def run(settings: dict) -> list:
    """The batches that a training sees."""
    Seeing.seen = []
    assert Seeing(make_config(Seeing.Config, settings)).run() == 0
    return Seeing.seen


@pytest.mark.integration
def test_samples_without_a_class_are_left_out_and_bad_ones_counted(small_mini, tmp_path, capfd):
    members = numbered(8)
    members[1].pop("cls")
    members[2]["cls"] = b"900"
    batches = run(small_settings(tmp_path, write_classed(tmp_path / "a.tar", members), validation_samples=2))
    told = capfd.readouterr().err
    assert "1 rejected: no .cls" in told or "no .cls" in told
    assert "00002.cls: class 900 is outside of 0 to 4" in told
    for batch in batches:
        assert batch.extra[CLASS].tolist() == [int(key) % CLASSES for key in batch.keys]


@pytest.mark.integration
@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({}, "class_getter: no sample has a .cls.*Write one of these into class_getter, or put NAME.cls"),
        ({"cls": b"900"}, "class 900 is outside of 0 to 4"),
    ],
)
def test_data_without_any_usable_class_end_the_run(small_mini, tmp_path, member, message):
    data = write_classed(tmp_path / "a.tar", [member] * 4)
    kind = TrainDit
    settings = small_settings(tmp_path, data, max_bad_samples=4, sample_classes=[0])
    with pytest.raises(UserError, match=message):
        kind(make_config(kind.Config, settings)).run()


@pytest.mark.integration
@pytest.mark.parametrize("getter", [["cls", "identity"], ["json", "lambda j: j['label']"]])
def test_classes_travel_in_caches(small_mini, tmp_path, getter):
    data = write_classed(tmp_path / "data" / "a.tar", numbered(6))
    given = small_settings(tmp_path, data, class_getter=getter)
    cache = make_cache("train_dit", given, tmp_path / "cache", "--dtype", "float32")
    run(given)
    expected = read_metrics(given)
    alone = given | {"experiment_id": "cached", "webdataset_path": str(cache)}
    batches = run(alone)
    assert [line["loss"] for line in read_metrics(alone)] == pytest.approx([line["loss"] for line in expected])
    for batch in batches:
        assert batch.images is None
        assert batch.extra[CLASS].tolist() == [int(key) % CLASSES for key in batch.keys]


@pytest.mark.integration
def test_folders_are_classes_by_the_keys_of_samples(small_mini, tmp_path):
    data = write_classed(tmp_path / "a.tar", [{} for _ in range(4)])
    batches = run(small_settings(tmp_path, data, class_getter=["key", "lambda k: int(k) % 2"]))
    for batch in batches:
        assert batch.extra[CLASS].tolist() == [int(key) % 2 for key in batch.keys]


def test_a_field_travels_to_workers():
    import pickle

    field = pickle.loads(pickle.dumps(ClassField.parse(["json", "lambda j: j['label']"], 5)))
    assert field.decode(json.dumps({"label": 4}).encode(), None, sample()).item() == 4
