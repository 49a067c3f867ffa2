"""Learning rates against golden numbers; what `constant`, `cosine` and `linear` do elsewhere is in test_optim.py."""

import pytest
import torch
from transformers import get_scheduler

from tests.golden import load_case
from tests.warpcore.runs import tiny_settings, train_here, write_shard
from warpcore.config import Config, ConfigError, make_config
from warpcore.lr_schedules import CYCLE_KEYS, LinearCycles, lr_at

GIVEN = {
    "experiment_id": "test", "checkpoint_path": "runs", "updates": 10, "batch_size": 8, "webdataset_path": "a.tar",
    "lr_schedule": "lambdalinear",
}  # fmt: skip
CASES = {one["name"]: one for one in load_case("cosmos/lr_schedules")[0]["table"]}


@pytest.mark.parametrize("name", sorted(name for name, one in CASES.items() if "Linear" in one["class"]))
def test_golden_factors(name):
    case = CASES[name]
    cycles = LinearCycles(**case["kwargs"])
    for finished, factor in case["factor"].items():
        update = int(finished) + 1
        given = {"schedule": "lambdalinear", "warmup_updates": 1, "updates": cycles.updates, "cycles": cycles}
        assert lr_at(update, lr=0.5, **given) == pytest.approx(0.5 * factor, rel=1e-12)


SCHEDULERS = {
    "constant": {"lr_schedule": "constant"},
    "constant_with_warmup": {"lr_schedule": "constant", "warmup_updates": 6},
    "linear": {"lr_schedule": "linear", "warmup_updates": 6},
    "cosine": {"lr_schedule": "cosine", "warmup_updates": 6},
    "cosine_with_min_lr": {"lr_schedule": "cosine", "warmup_updates": 6, "min_lr_ratio": 0.1},
    "cosine_with_restarts": {"lr_schedule": "cosine", "warmup_updates": 6, "num_cycles": 2},
    "linear_with_min_lr": {"lr_schedule": "linear", "warmup_updates": 6, "min_lr_ratio": 0.1},
    "rex": {"lr_schedule": "rex", "min_lr_ratio": 0.1, "updates": 41},
}
"""The keys for the schedules of transformers and of the trainer of SD with T5.

Theirs begin to fall one update before the end of ours: with a warm-up the first update is at 0 there, and is left out
here, and without one the last update is not at the end there.
"""


@pytest.mark.parametrize("row", load_case("sd_t5/learning_rates")[0]["rows"], ids=lambda row: row["scheduler"])
def test_rates_are_those_of_the_reference(row):
    keys = SCHEDULERS[row["scheduler"]]
    config = make_config(Config, GIVEN | {"updates": row["max_steps"], "lr": row["learning_rate"]} | keys)
    expected = row["lr_of_update"][1:] if "warmup_updates" in keys else row["lr_of_update"]
    found = [
        lr_at(
            update, schedule=config.lr_schedule, lr=config.lr, warmup_updates=config.warmup_updates,
            updates=config.updates, min_lr_ratio=config.min_lr_ratio, num_cycles=config.num_cycles,
        )
        for update in range(1, config.updates + 1)
    ]  # fmt: skip
    assert len(found) >= row["max_steps"]
    assert found == pytest.approx(expected[: len(found)], rel=1e-6, abs=1e-18)


SMALL_END = {"min_lr_ratio": 0.1}
OF_TRANSFORMERS = {
    "polynomial": (SMALL_END | {"lr_power": 2.5}, {"power": 2.5, "lr_end": 2e-5}),
    "inverse_sqrt": ({}, {}),
    "warmup_stable_decay": (SMALL_END | {"decay_updates": 15}, SMALL_END | {"num_decay_steps": 15}),
}
"""By schedule, our keys and theirs."""


@pytest.mark.parametrize("schedule", OF_TRANSFORMERS)
@pytest.mark.parametrize("warmup_updates", [0, 1, 6])
def test_rates_after_the_warm_up_are_those_of_transformers(schedule, warmup_updates):
    """Update 1 without a warm-up, and else its last update, are at `lr`: their first, or the one behind theirs."""
    keys, theirs = OF_TRANSFORMERS[schedule]
    given = {"updates": 40, "lr": 2e-4, "warmup_updates": warmup_updates, "lr_schedule": schedule} | keys
    config = make_config(Config, GIVEN | given)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    steps = warmup_updates if warmup_updates > 1 else 0
    of_training = config.updates - (not steps)
    scheduler = get_scheduler(schedule, optimizer, steps, of_training, scheduler_specific_kwargs=theirs)
    expected = []
    for _ in range(of_training + 1):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    found = [
        lr_at(
            update, schedule=schedule, lr=config.lr, warmup_updates=config.warmup_updates, updates=config.updates,
            min_lr_ratio=config.min_lr_ratio, power=config.lr_power, decay_updates=config.decay_updates,
        )
        for update in range(config.warmup_updates, config.updates + 1)
    ]  # fmt: skip
    assert found == pytest.approx(expected[steps:], rel=1e-9)


def test_a_stable_rate_falls_in_the_last_tenth():
    given = {"schedule": "warmup_stable_decay", "lr": 1.0, "warmup_updates": 4, "updates": 50}
    rates = [lr_at(update, **given) for update in range(1, 51)]
    assert rates[3:45] == [1.0] * 42
    assert rates[44:] == sorted(rates[44:], reverse=True)
    assert rates[-1] == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lr_schedule": "cosine", "lr_power": 2}, "lr_power: only lr_schedule: polynomial reads this"),
        ({"lr_schedule": "linear", "decay_updates": 2}, "decay_updates: only lr_schedule: warmup_stable_decay reads"),
        ({"lr_schedule": "inverse_sqrt", "min_lr_ratio": 0.1}, "min_lr_ratio: lr_schedule: inverse_sqrt ends nowhere"),
        ({"lr_schedule": "inverse_sqrt", "num_cycles": 2}, "num_cycles: only lr_schedule: cosine, linear, rex, polyn"),
        (
            {"lr_schedule": "warmup_stable_decay", "decay_updates": 9, "warmup_updates": 3},
            "decay_updates: 9 of them and warmup_updates: 3 are more than updates: 10",
        ),
    ],
)
def test_keys_of_other_schedules_are_refused(keys, message):
    with pytest.raises(ConfigError, match=message):
        make_config(Config, GIVEN | keys)


def test_every_cycle_begins_at_the_whole_rate_and_the_last_ends_at_the_least():
    given = {"lr": 1.0, "warmup_updates": 1, "updates": 31, "min_lr_ratio": 0.25, "num_cycles": 3}
    for schedule in ("cosine", "linear", "rex"):
        rates = [lr_at(update, schedule=schedule, **given) for update in range(1, 32)]
        assert [update for update, rate in enumerate(rates, 1) if rate == 1] == [1, 11, 21]
        assert rates[-1] == 0.25
        assert rates[1:10] == pytest.approx(rates[11:20])
        assert rates[1:10] == pytest.approx(rates[21:30])
        assert sorted(rates[:10], reverse=True) == rates[:10]


def test_each_of_many_cycles_begins_at_the_peak():
    given = {"schedule": "cosine", "lr": 1.0, "warmup_updates": 1, "updates": 4901, "num_cycles": 49}
    assert [lr_at(1 + 100 * cycle, **given) for cycle in range(49)] == [1] * 49  # in floats, 49 * (1 / 49) is below 1
    assert lr_at(4901, **given) == 0


def test_defaults_are_those_of_the_published_config_system():
    assert dict(zip(CYCLE_KEYS, vars(make_config(Config, GIVEN).lr_cycles).values(), strict=True)) == {
        name: tuple(values) for name, values in CASES["defaults"]["kwargs"].items()
    }
    assert make_config(Config, GIVEN | {"lr_schedule": "constant"}).lr_cycles is None


@pytest.mark.integration
def test_a_resumed_run_has_the_learning_rates_of_the_cycles(tmp_path):
    cycles = {
        "warm_up_steps": [1, 0],
        "cycle_lengths": [2, 3],
        "f_start": [0.5, 1],
        "f_max": [1, 0.5],
        "f_min": [0, 0],
    }
    settings = tiny_settings(tmp_path / "runs", write_shard(tmp_path / "a.tar", 8), log_every=1) | cycles
    settings |= {"lr_schedule": "lambdalinear", "lr": 0.1}
    train_here(settings | {"updates": 3})
    status, lines = train_here(settings | {"updates": 5})
    assert status == 0
    assert [line["lr"] for line in lines] == pytest.approx([0.05, 0.1, 0.0, 0.1 * 0.5 * 2 / 3, 0.1 * 0.5 / 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"updates": 31, "cycle_lengths": [30], "warm_up_steps": [2]},
            "updates: 31 are more than the 30 of all cycle",
        ),
        (
            {"cycle_lengths": [20, 10]},
            "one entry per cycle into each list; there are warm_up_steps 1, cycle_lengths 2",
        ),
        ({"cycle_lengths": [20]}, "warm_up_steps: 1000 is not less than the 20 of cycle_lengths"),
        ({"cycle_lengths": [], "warm_up_steps": []}, "one entry per cycle into each list"),
        (
            {"warmup_updates": 5},
            "warmup_updates: the cycles of lr_schedule: lambdalinear have warm_up_steps and f_min",
        ),
        ({"lr_schedule": "cosine", "f_max": [0.4]}, "f_max: only lr_schedule: lambdalinear reads this"),
        ({"f_max": [-1]}, "f_max"),
        ({"num_cycles": 2}, "num_cycles: only lr_schedule: cosine, linear, rex, polynomial read this"),
    ],
)
def test_what_fits_no_cycle_is_one_clear_error(changes, message):
    with pytest.raises(ConfigError) as error:
        make_config(Config, GIVEN | changes)
    assert message in str(error.value)
