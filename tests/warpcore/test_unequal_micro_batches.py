"""Buckets with micro-batch sizes of their own: an update is the mean over its samples, on any number of processes."""

from itertools import islice

import pytest
import torch
from torch import nn

from tests.many_processes import launch_processes
from tests.warpcore.data.tars import catalog_of, write_shard
from tests.warpcore.runs import load_weights, read_metrics, tiny_settings, train_here
from warpcore.batch_size import split_batch
from warpcore.clip_keys import ClipKeys
from warpcore.config import Config, ConfigError, dump_config, load_config, make_config
from warpcore.core import Losses, WarpCore
from warpcore.data.plan import Plan
from warpcore.errors import UserError

PER_UPDATE, UPDATES, HELD_OUT = 4, 6, 7
BUCKETS = {"16px": {1: [0.5, 5]}, "12px": {1: [1.0, 1]}, "8px": {1: [1.0, 3]}}


class SizesConfig(ClipKeys, Config):
    pass


class LearnSizes(WarpCore):
    """Learns a number from the true size of each picture."""

    Config = SizesConfig
    needs_images = needs_captions = draws_samples = False
    bucket_factor = 4

    def build(self):
        return {"generator": nn.Sequential(nn.Linear(2, 8), nn.GELU(), nn.Linear(8, 1))}

    def index_columns(self):
        return ["width", "height", "score"]

    def encode(self, batch, random):
        columns = {name: value.float() for name, value in batch.columns.items()}
        return torch.stack([columns["width"] / 16, columns["height"] / 16], dim=1), columns["score"]

    def loss(self, inputs, random):
        sizes, score = inputs
        raw = (self.networks["generator"](sizes)[:, 0] - score).square()
        return Losses(raw, raw, metrics={"twice": 2 * raw})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_shard(tmp_path_factory.mktemp("data") / "a.tar", 60, sizes=((16, 16), (16, 12), (12, 12), (8, 9)))


def settings_of(folder, data, **changes) -> dict:
    settings = tiny_settings(
        folder, data, bucket_config=BUCKETS, micro_batches_per_update=PER_UPDATE, updates=UPDATES, eps=1e-3,
        weight_decay=0.0, clip_grad_norm=None, ema_start_iters=None, save_every=3, validation_samples=HELD_OUT,
    )  # fmt: skip
    return {name: value for name, value in settings.items() if name not in ("batch_size", "image_size")} | changes


def train(settings: dict) -> None:
    assert train_here(settings, LearnSizes, SizesConfig)[0] == 0


class Plain:
    """The same training as one loop over all samples of each update."""

    def __init__(self, settings: dict):
        config = make_config(SizesConfig, settings)
        torch.manual_seed(config.seed)
        self.network = LearnSizes(config).build()["generator"]
        plan = Plan(
            catalog_of(settings["webdataset_path"]), micro_batch_size=None,
            buckets=config.buckets(4).drawn_by_row(),  # as in a run that needs no pictures
            seed=config.seed, validation_samples=HELD_OUT,
        )  # fmt: skip
        self.scores = {f"{n:06d}": n / 10 for n in range(60)}
        self.losses, self.norms, self.seen, self.sizes = [], [], [0], []
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0.0
        )
        planned = plan.micro_batches()
        for _ in range(UPDATES):
            micro_batches = list(islice(planned, PER_UPDATE))
            samples = [sample for one in micro_batches for sample in one.samples]
            loss = self.loss(samples).mean()
            optimizer.zero_grad()
            loss.backward()
            self.norms.append(float(nn.utils.get_total_norm([p.grad for p in self.network.parameters()])))
            optimizer.step()
            self.losses.append(float(loss.detach()))
            self.seen.append(self.seen[-1] + len(samples))
            self.sizes.append({len(one.samples) for one in micro_batches})
        held_out = [sample for one in plan.validation() for sample in one.samples]
        assert len(held_out) <= HELD_OUT
        with torch.no_grad():
            self.validation = float(self.loss(held_out).mean())

    def loss(self, samples) -> torch.Tensor:
        sizes = torch.tensor([[sample.width / 16, sample.height / 16] for sample in samples])
        return (self.network(sizes)[:, 0] - torch.tensor([self.scores[sample.key] for sample in samples])).square()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("starts", "changes"),
    [
        ([(1, UPDATES)], {}),
        pytest.param([(2, 3), (1, UPDATES)], {}, marks=pytest.mark.slow),
        pytest.param([(4, 3), (2, UPDATES)], {"use_fsdp": True}, marks=pytest.mark.slow),
    ],
    ids=["one process", "two, then one", "four, then two, sharded"],
)
def test_updates_are_those_of_one_loop_over_all_their_samples(data, tmp_path, starts, changes):
    settings = settings_of(tmp_path, data)
    plain = Plain(settings)
    assert any(len(sizes) > 1 for sizes in plain.sizes), "micro-batches of an update are unequal"
    for processes, updates in starts:
        given = settings | changes | {"updates": updates}
        train(given) if processes == 1 else launch_processes(processes, train, given)
    lines = read_metrics(settings)
    assert [line["loss"] for line in lines] == pytest.approx(plain.losses, abs=1e-5)
    assert [line["twice"] for line in lines] == pytest.approx([2 * loss for loss in plain.losses], abs=2e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(plain.norms, abs=1e-5)
    assert [line["samples_seen"] for line in lines] == plain.seen[1:]
    assert lines[-1]["validation_loss"] == pytest.approx(plain.validation, abs=1e-5)
    for name, weights in plain.network.state_dict().items():
        torch.testing.assert_close(load_weights(settings)[name], weights, rtol=0, atol=1e-5)


def test_processes_that_do_not_divide_an_update_are_refused(data, tmp_path):
    config = make_config(SizesConfig, settings_of(tmp_path, data, micro_batches_per_update=6))
    assert split_batch(config, 3, None) == (None, 2)
    with pytest.raises(UserError, match="micro_batches_per_update 6 does not divide by 4 processes: write "):
        split_batch(config, 4, None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batches_per_update": None}, "bucket_config needs micro_batches_per_update"),
        ({"batch_size": 8}, "batch_size: bucket_config says this for each bucket"),
        ({"num_frames": 17, "image_size": 64}, "num_frames, image_size: bucket_config says"),
        ({"bucket_config": {}}, "num_frames or bucket_config is required"),
        ({"bucket_config": {}, "num_frames": 17}, "batch_size: this key is required"),
        ({"bucket_config": {}, "num_frames": 17, "batch_size": 4}, "micro_batches_per_update goes with bucket_config"),
        ({"bucket_config": {"240p": {17: [0.0, None]}}}, "no bucket keeps a sample"),
        ({"bucket_config": {"240p": {17: [[0.0, 0.5], None]}}}, "no bucket keeps a sample"),
        ({"bucket_config": {"240p": {17: [1.5, 2]}}}, r"240p: 17 has \[1.5, 2\]: write \[share of the clips to keep"),
        ({"bucket_config": {"240p": {17: [1.0, 0]}}}, r"240p: 17 has \[1.0, 0\]: write"),
        ({"bucket_config": {"240p": {17: 8}}}, "240p: 17 has 8: write"),
        ({"bucket_config": {"240p": {17: [[1, 1, 1], 8]}}}, "240p: 17 has .*: write"),
        ({"bucket_config": {"240p": {17: [1.0, [8, 2, 1]]}}}, "240p: 17 has .*: write"),
        ({"bucket_config": {"240p": {0: [1.0, 8]}}}, "240p has 0, which is no number of frames from 1 to 100,000"),
        ({"bucket_config": {"240p": {True: [1.0, 8]}}}, "240p has True, which is no number of frames"),
        ({"bucket_config": {"240p": []}}, r"240p needs numbers of frames, such as \{51: \[1.0, 8\]\}"),
        ({"bucket_config": [1]}, "write resolutions with numbers of frames"),
        ({"frame_stride": 2, "frame_rate": 8.0}, "frame_stride and frame_rate exclude each other"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_config(SizesConfig, settings_of(tmp_path, data, **changes))


def test_a_bucket_config_is_read_as_yaml_and_json_write_it(data, tmp_path):
    given = {256: {"1": ["5e-1", "4"]}, "240p": {17: ((1.0, 0.5), [8, 4]), 34: [0, None]}}
    config = make_config(SizesConfig, settings_of(tmp_path, data, bucket_config=given))
    assert config.bucket_config == {"256": {1: [0.5, 4]}, "240p": {17: [[1.0, 0.5], [8, 4]], 34: [0.0, None]}}
    (tmp_path / "saved.yaml").write_text(dump_config(config))
    assert load_config(SizesConfig, [str(tmp_path / "saved.yaml")]) == config
    argument = ["bucket_config={240p: {17: [1.0, 8]}}"]
    assert load_config(SizesConfig, [str(tmp_path / "saved.yaml"), *argument]).bucket_config == {
        "240p": {17: [1.0, 8]}
    }


def test_a_script_of_pictures_refuses_the_keys_of_clips_by_name(data, tmp_path):
    keys = {
        "num_frames": 17,
        "frame_stride": 2,
        "frame_rate": 8,
        "bucket_config": BUCKETS,
        "micro_batches_per_update": 4,
    }
    assert {*keys, "batch_size"} == set(ClipKeys.model_fields)
    for key, value in keys.items():
        with pytest.raises(ConfigError, match=f"{key}: unknown key: it is for scripts that train on clips"):
            make_config(Config, tiny_settings(tmp_path, data, **{key: value}))


@pytest.mark.parametrize(("image_size", "name"), [(64, "64px x 17 frames"), ([64, 32], "64x32px x 17 frames")])
def test_buckets_of_one_length_are_told_by_their_size(data, tmp_path, image_size, name):
    one_length = {"bucket_config": {}, "micro_batches_per_update": None, "num_frames": 17, "batch_size": 4}
    config = make_config(SizesConfig, settings_of(tmp_path, data, **one_length, image_size=image_size))
    assert [str(rung) for rung in config.buckets(8).rungs] == [name]
