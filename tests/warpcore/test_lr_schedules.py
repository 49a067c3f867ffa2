"""Learning rates in cycles against golden numbers; those of `constant`, `cosine` and `linear` are in test_optim.py."""

import pytest

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
    ],
)
def test_what_fits_no_cycle_is_one_clear_error(changes, message):
    with pytest.raises(ConfigError) as error:
        make_config(Config, GIVEN | changes)
    assert message in str(error.value)
