"""The combination of changes that is suggested is the cheapest of all that fit."""

import random
from itertools import product
from types import SimpleNamespace

import pytest

from tests.warpcore.runs import TinyConfig, tiny_settings
from warpcore.config import load_config, make_config
from warpcore.fitting import Change, Fitting, on_command_line

ROWS = 6


def made_up(seed: int) -> tuple[Fitting, dict[str, list[int]], set[frozenset[str]], set[str]]:
    """Changes with one to three options, what each saves, which exclude each other, and which the run refuses."""
    numbers = random.Random(seed)
    saved = {f"key_{row}": sorted(numbers.sample(range(1, 60), numbers.randint(1, 3))) for row in range(ROWS)}
    pairs = {frozenset(numbers.sample(sorted(saved), 2)) for _ in range(numbers.randint(0, 3))}
    refused = {key for key in saved if numbers.random() < 0.1}
    config = SimpleNamespace(**dict.fromkeys(saved, 0))
    changes = [
        Change(lambda run, key=key: [{key: option + 1} for option in range(len(saved[key]))], f"{key}'s price")
        for key in saved
    ]
    allowed = lambda keys: not any(pair <= keys.keys() for pair in pairs)  # noqa: E731
    return Fitting(SimpleNamespace(config=config), allowed, changes), saved, pairs, refused


@pytest.mark.parametrize("seed", range(40))
def test_no_combination_that_fits_is_cheaper(seed):
    fitting, saved, pairs, refused = made_up(seed)

    def needs(keys: dict[str, int]) -> float | None:
        assert not any(pair <= keys.keys() for pair in pairs), "asked about what the config refuses"
        return None if refused & keys.keys() else 200 - sum(saved[key][option - 1] for key, option in keys.items())

    able = [
        choice
        for choice in product(*(range(len(options) + 1) for options in saved.values()))
        if not any(pair <= fitting.keys(choice).keys() for pair in pairs) and not refused & fitting.keys(choice).keys()
    ]
    for usable in range(0, 210, 7):
        fitting_ones = [choice for choice in able if needs(fitting.keys(choice)) <= usable]
        fits, found = fitting.cheapest(needs, usable)
        assert fits == bool(fitting_ones)
        assert found == min(fitting_ones, key=lambda choice: choice[::-1], default=found)


def test_where_two_changes_write_one_key_the_dearer_counts():
    config = SimpleNamespace(level=0, sent=False)
    changes = (
        Change(lambda run: [{"level": 1}, {"level": 2}], "twice"),
        Change(lambda run: [{"sent": True, "level": 1}, {"sent": True, "level": 2}], "sent"),
        Change(lambda run: [{"level": 0}], "nothing new"),
    )
    fitting = Fitting(SimpleNamespace(config=config), lambda keys: True, changes)
    assert fitting.largest() == [(2, 2, 0)]
    needs = {(0, False): 9, (1, False): 8, (2, False): 7, (1, True): 5, (2, True): 4}
    _, choice = fitting.cheapest(lambda keys: needs[keys.get("level", 0), keys.get("sent", False)], 5)
    assert fitting.keys(choice) == {"sent": True, "level": 1}
    assert list(fitting.costs(choice)) == [({"sent": True, "level": 1}, "sent")]


def test_a_change_is_given_back_though_its_first_option_takes_more_memory_than_none_of_it():
    """As it writes a lower level than an earlier change."""
    config = SimpleNamespace(level=0, sent=False, halves=False)
    changes = (
        Change(lambda run: [{"level": 1}, {"level": 2}], "twice"),
        Change(lambda run: [{"sent": True, "level": 1}, {"sent": True, "level": 2}], "sent"),
        Change(lambda run: [{"halves": True}], "rounded"),
    )
    fitting = Fitting(SimpleNamespace(config=config), lambda keys: True, changes)
    needs = {0: 9, 1: 8, 2: 5}

    def needed(keys: dict) -> float:
        return needs[keys.get("level", 0)] - keys.get("sent", False) - 3 * keys.get("halves", False)

    for usable, expected in {4: {"level": 2, "sent": True}, 3: {"level": 2, "halves": True}}.items():
        fits, choice = fitting.cheapest(needed, usable)
        assert fits
        assert fitting.keys(choice) == expected


@pytest.mark.parametrize("shape", [1.0, 0.5, 2.0, 8.0], ids=["line", "root", "square", "cliff"])
def test_of_many_options_few_are_counted(shape):
    """Counting what one needs takes seconds, and a network may have a hundred blocks to swap."""
    changes = (Change(lambda run: [{"blocks": count + 1} for count in range(100)], "travel"),)
    fitting = Fitting(SimpleNamespace(config=SimpleNamespace(blocks=0)), lambda keys: True, changes)
    for first in range(101):
        counted = set()

        def needed(keys: dict, counted: set[int] = counted) -> float:
            counted.add(keys.get("blocks", 0))
            return 1 - (keys.get("blocks", 0) / 100) ** shape

        fits, (found,) = fitting.cheapest(needed, 1 - (first / 100) ** shape)
        assert fits
        assert found == first
        assert len(counted) <= (5 if shape == 1 else 19)


def test_what_is_printed_can_be_pasted_behind_a_config(tmp_path):
    keys = {"offload": ["encoders", "activations"], "activation_checkpointing": 3, "use_fsdp": True}
    keys |= {"clip_grad_norm": None, "weights_dtype": "bfloat16"}
    written = on_command_line(keys)
    assert written.startswith("offload='[encoders,activations]' activation_checkpointing=3 use_fsdp=true ")
    plain = make_config(TinyConfig, tiny_settings(tmp_path, tmp_path))
    given = [f"{key}={value}" for key, value in tiny_settings(tmp_path, tmp_path).items()]
    read = load_config(TinyConfig, [*given, *written.replace("'", "").split()])
    assert read == make_config(TinyConfig, plain.model_dump() | keys)
