"""What is frozen, what decays and what is computed again are those of the reference's trainings."""

import pytest

from families.nova.published_groups import published_groups
from tests.small_nova import golden_nova, load_nova
from warpcore.parameter_groups import freeze, optimizer_groups

CALLS, _ = load_nova("training_setup")
TRAININGS = {"t2i": "text to image", "t2v": "text to video", "c2i": "class to image"}
NETWORKS = {"t2i": "transformer_t2i_small", "t2v": "transformer_t2v_small", "c2i": "loss_c2i"}


@pytest.mark.parametrize("name", TRAININGS)
def test_frozen_and_decaying_parameters_are_those_of_the_reference(name):
    network = golden_nova(NETWORKS[name]).requires_grad_(True)
    parameters = {f"generator.{parameter}": value for parameter, value in network.named_parameters()}
    groups = published_groups(TRAININGS[name], parameters, weight_decay=0.02)
    found = {
        parameter.removeprefix("generator."): next(group for group in groups if group.matches(parameter))
        for parameter in parameters
    }
    frozen = sorted(parameter for parameter, group in found.items() if group.frozen)
    assert frozen == sorted(CALLS[name]["parameters_frozen"])
    for expected in CALLS[name]["result"]:
        decay = 0.02 if expected["weight_decay"] == "default" else expected["weight_decay"]
        named = sorted(parameter for parameter, group in found.items() if group.weight_decay == decay)
        assert named == sorted(expected["names"])
    freeze({"generator": network}, groups)
    trained = {parameter: value for parameter, value in parameters.items() if value.requires_grad}
    made = optimizer_groups({"generator": {}}, trained, groups)
    assert sorted(one for group in made for one in group["param_names"]) == sorted(trained)
    assert len(trained) == len(parameters) - len(frozen)


def test_levels_of_checkpointing_compute_again_what_the_reference_does():
    network, levels = golden_nova("transformer_t2v_small"), CALLS["checkpointing"]["result"]
    for level, expected in levels.items():
        network.set_activation_checkpointing(int(level))
        named = {name for name, module in network.named_modules() if getattr(module, "checkpointed", False)}
        assert {name.partition(".")[0] for name in named} == {one.partition(".")[0] for one in expected}
