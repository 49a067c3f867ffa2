"""The memory that a run is said to need is what it takes."""

import gc
from pathlib import Path

import pytest
import torch
import yaml
from torch.profiler import ProfilerActivity, profile

from tests.caches import make_cache
from tests.golden import load_manifest
from tests.tiers import represented_by
from tests.train.test_every_script import SETTINGS, settings  # noqa: F401
from tests.train.test_separate_caches import CACHED, CHANGES, SPARED
from tests.warpcore.runs import TINY, tiny_settings
from tests.warpcore.tiny import Denoiser, TinyConfig
from tests.warpcore.tiny_clips import ClipConfig, ClipDenoiser
from tools import memory
from tools.cache_features import as_if_cached
from warpcore import planning
from warpcore.config import make_config
from warpcore.errors import UserError
from warpcore.planning import USABLE, Plan
from warpcore.rehearsal import OnShapes, Rehearsal, bucket_sizes, load_use_case

TRAIN = Path(__file__).parents[2] / "train"
GIB = 2**30


def measured_peak(rehearsal: Rehearsal, size: tuple[int, int], count: int) -> int:
    """The most bytes that PyTorch's allocator gave out during an update, beyond those before it."""
    rehearsal.update(size, count)
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        rehearsal.update(size, count)
    alive = peak = 0
    for event in sorted(recorded.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


OFFLOAD = {"offload": ["encoders", "activations"], "activation_checkpointing": 3}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(
            name, changes, marks=[] if (name, changes) == ("train_c_controlnet", OFFLOAD) else pytest.mark.slow
        )
        for name, changes in [
            *((name, {}) for name in SETTINGS),
            ("train_b", OFFLOAD),
            ("train_sd", {"activation_checkpointing": 1}),
            ("train_sd", OFFLOAD),
            ("train_vae", {"mid_block_attention": True}),
            ("train_c_controlnet", OFFLOAD),
        ]
    ],
)
def test_counted_activations_are_those_of_a_real_update(settings, name, changes):  # noqa: F811
    use_case = load_use_case(TRAIN / f"{name.split()[0]}.py")
    given = settings(name, "memory", batch_size=8, image_size=96, **changes)
    given.pop("train_tokens", None)
    config = make_config(use_case.Config, given)
    with OnShapes(use_case, config, "cpu") as shapes:
        size = bucket_sizes(shapes.run)[0]
        counted = shapes.needs(size, 8)
    with Rehearsal(use_case, config, memory_limit=GIB) as rehearsal:
        peak = measured_peak(rehearsal, size, 8)
        weights = sum(p.nbytes for p in rehearsal.run.parameters.values())
        living = sum(t.nbytes for t in rehearsal.living())
    assert counted.weights == counted.gradients == weights
    # Here the device's memory is the CPU's.
    assert counted.total + counted.on_cpu == pytest.approx(living + peak, rel=0.10)


@pytest.mark.integration
@pytest.mark.parametrize("name", [name for name in SETTINGS if " " not in name and not name.endswith("lora")])
def test_every_script_makes_an_update_on_shapes_alone(settings, name):  # noqa: F811
    """Stands for the slow test above: what an update computes also works on PyTorch's device without memory."""
    use_case = load_use_case(TRAIN / f"{name.split()[0]}.py")
    config = make_config(use_case.Config, settings(name, "shapes", batch_size=2))
    with OnShapes(use_case, config, "cpu") as shapes:
        needs = shapes.needs(bucket_sizes(shapes.run)[0], 2)
    assert needs.activations > 0
    assert needs.gradients == needs.weights > 0


@pytest.mark.slow
def test_checkpointing_and_the_batch_change_what_is_counted(settings):  # noqa: F811
    use_case = load_use_case(TRAIN / "train_c.py")
    config = make_config(use_case.Config, settings("train_c", "levels", batch_size=8))
    with OnShapes(use_case, config, "cuda") as shapes:
        assert shapes.run.dtype == torch.bfloat16
        size, totals = bucket_sizes(shapes.run)[0], []
        for level in planning.LEVELS:
            shapes.set_checkpointing(level)
            totals.append(shapes.needs(size, 8, accumulation=2).activations)  # the second one finds gradients there
        assert totals[0] > totals[1] >= totals[2] >= totals[3]
        shapes.set_checkpointing(0)
        assert shapes.needs(size, 4, accumulation=2).activations < 0.7 * totals[0]


@pytest.mark.slow
def test_sharding_divides_what_lives_between_updates_and_not_the_activations(settings):  # noqa: F811
    use_case = load_use_case(TRAIN / "train_c.py")
    counted = []
    for use_fsdp in (False, True):
        config = make_config(use_case.Config, settings("train_c", "sharded", batch_size=8, use_fsdp=use_fsdp))
        with OnShapes(use_case, config, "cpu", processes=4) as shapes:
            counted.append(shapes.needs(bucket_sizes(shapes.run)[0], 8, accumulation=2))
    whole, shared = counted
    for part in ("weights", "gradients", "optimizer", "ema"):
        assert getattr(shared, part) == pytest.approx(getattr(whole, part) / 4, rel=0.01)
    # Beside the activations, which are the same, two blocks and their gradients are whole at a time.
    assert whole.activations < shared.activations < whole.activations + whole.weights + whole.gradients


@pytest.mark.integration
def test_offloaded_weights_leave_the_device_and_are_counted_in_the_memory_of_the_cpu(settings):  # noqa: F811
    use_case = load_use_case(TRAIN / "train_c_controlnet.py")
    given = settings("train_c_controlnet", "offloaded", batch_size=8)
    counted = []
    for changes in ({}, {"use_fsdp": True, "fsdp_cpu_offload": True}):
        config = make_config(use_case.Config, given | changes)
        with OnShapes(use_case, config, "cpu") as shapes:
            counted.append(shapes.needs(bucket_sizes(shapes.run)[0], 8))
            blocks = sum(p.nbytes for n in ("generator", "previewer") for p in shapes.run.networks[n].parameters())
    whole, away = counted
    assert away.weights == away.gradients == away.optimizer == away.ema == whole.on_cpu == 0
    assert away.on_cpu == whole.weights + whole.gradients + whole.optimizer + whole.ema + blocks
    assert away.frozen == whole.frozen - blocks


@pytest.mark.slow
def test_what_is_suggested_costs_more_the_less_memory_there_is(settings, capsys):  # noqa: F811
    use_case = load_use_case(TRAIN / "train_c.py")
    plan = Plan(use_case, make_config(use_case.Config, settings("train_c", "less", batch_size=2)), "cuda")
    needs = plan.needs({})
    for total in (needs.total, needs.total - needs.ema // 2, needs.weights):
        memory.suggest(plan, 1.001 * total / USABLE)
    suggested = [line for line in capsys.readouterr().out.splitlines() if line]
    assert suggested[0].endswith("GiB: this config")
    assert suggested[2].endswith("GiB: ema_device=cpu")
    assert suggested[4] == "- ema_device=cpu: the device waits when the average moves (ema_iters)"
    assert suggested[5].endswith("GiB: use_fsdp=true fsdp_cpu_offload=true")


@pytest.mark.integration
def test_a_card_that_is_nearly_enough_gets_one_line_of_keys_and_a_key_without_effect_one_warning(
    tmp_path, capsys, monkeypatch, caplog
):
    given = tiny_settings(tmp_path, tmp_path, batch_size=8, min_lr_ratio=0.5)
    whole = Plan(Denoiser, make_config(TinyConfig, given), "cpu").needs({})
    caplog.clear()
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(given))
    card = f"{(whole.total - whole.ema // 2) / USABLE / GIB:.12f}"
    arguments = ["memory.py", str(TINY), str(tmp_path / "tiny.yaml"), "--device", "cpu", "--gpu-memory", card]
    monkeypatch.setattr("sys.argv", arguments)
    memory.main()
    shown = capsys.readouterr().out
    assert shown.count("fits") == shown.count("GiB: ema_device=cpu\n") == 1
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [line.partition(",")[0] for line in warned] == ["min_lr_ratio has no effect without lr_schedule: cosine"]


@pytest.mark.slow
def test_what_a_network_does_not_offer_is_neither_counted_nor_suggested(settings, capsys):  # noqa: F811
    use_case = load_use_case(TRAIN / "train_encoder.py")
    plan = Plan(use_case, make_config(use_case.Config, settings("train_encoder", "less", batch_size=2)), "cuda")
    memory.show(plan, buckets=False)
    memory.suggest(plan, 0)
    shown = capsys.readouterr().out
    assert "| 0 (this config) |" in shown
    assert "| 1 |" not in shown
    assert "nothing fits 0 GiB" in shown
    with pytest.raises(UserError, match=r"8 does not divide the 1 processes \(--processes\)"):
        plan.shapes({"use_fsdp": True, "fsdp_cpu_offload": True, "fsdp_shards": 8})


@pytest.mark.slow
def test_a_published_size_is_counted_without_its_weights(tmp_path, capsys, monkeypatch):
    config = {"base": str(TRAIN.parent / "configs/training/finetune_c_1b.yaml")}
    config |= {"batch_size": 4, "multi_aspect_ratio": [1], "clip_image_dropout": 1.0, "grad_accum_steps": 1}
    config |= {"activation_checkpointing": 3, "ema_start_iters": 1, "optimizer": "adamw"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    arguments = ["memory.py", str(TRAIN / "train_c.py"), str(tmp_path / "c.yaml"), "--gpu-memory", "80"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(planning, "LEVELS", (3,))
    memory.main()
    shown = capsys.readouterr().out
    weights = f"{4 * load_manifest('stage_c_1B')['parameter_count'] / GIB:.2f}"
    assert f"| {weights} | {weights} |" in shown
    assert "fits 80 GiB: this config" in shown


@pytest.mark.integration
@pytest.mark.parametrize("name", represented_by("train_cosmos", of=CACHED))
def test_without_a_cache_it_is_counted_as_with_one(settings, name, tmp_path):  # noqa: F811
    use_case = load_use_case(TRAIN / f"{name}.py")
    given = settings(name, "memory", batch_size=2, **CHANGES.get(name, {}))
    folders = [str(make_cache(name, given, tmp_path / kind, "--features", kind)) for kind in CACHED[name]]
    plain = make_config(use_case.Config, given)
    expected = make_config(use_case.Config, given | {"caches": folders})
    totals, as_cached = [], [(as_if_cached(use_case, plain, every_bucket), plain) for every_bucket in (True, False)]
    for kind, config in ((use_case, expected), *as_cached):
        with OnShapes(kind, config, "cpu") as shapes:
            totals.append(shapes.needs(bucket_sizes(shapes.run)[0], 2))
            assert not SPARED[name] & shapes.run.networks.keys()
    assert totals[0] == totals[1] == totals[2]


def test_what_trains_on_pictures_has_nothing_to_cache(settings):  # noqa: F811
    use_case = load_use_case(TRAIN / "train_vae.py")
    with pytest.raises(UserError, match="--cached: this script trains on pictures themselves"):
        as_if_cached(use_case, make_config(use_case.Config, settings("train_vae", "memory")))


@pytest.mark.integration
def test_clips_are_counted_with_the_micro_batch_of_their_bucket(tmp_path, capsys):
    buckets = {"32px": {1: [1.0, 9], 8: [1.0, 2], 4: [0.5, 3]}, "16px": {4: [0.0, None]}}
    given = tiny_settings(tmp_path, tmp_path, bucket_config=buckets, micro_batches_per_update=4)
    given = {key: value for key, value in given.items() if key not in ("batch_size", "image_size")}
    config = make_config(ClipConfig, given)
    memory.show(Plan(ClipDenoiser, config, "cpu", processes=2), buckets=True)
    with OnShapes(ClipDenoiser, config, "cpu") as shapes:
        counted = [shapes.needs(*of_bucket, 2) for of_bucket in (((8, 32, 32), 2), ((4, 32, 32), 3), ((1, 32, 32), 9))]
    told = capsys.readouterr().out
    assert "per process of 2, in GiB; micro-batch the bucket's, accumulation 2" in told
    rows = [line.split("|")[2:5] for line in told.splitlines() if "x 32 x 32" in line]
    assert [row[0].strip() for row in rows] == ["8 x 32 x 32", "4 x 32 x 32", "1 x 32 x 32"]
    assert [float(row[2]) for row in rows] == pytest.approx([needs.total / GIB for needs in counted], rel=0.1)
