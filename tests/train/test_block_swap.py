"""Every script beside a frozen base trains as well with blocks that wait in the CPU's memory, and it is counted."""

import pytest
import torch

from tests.tiers import represented_by
from tests.train.test_every_script import SETTINGS, files, settings, train, use_case  # noqa: F401
from tests.train.test_no_waiting import train_on_gpu
from tests.warpcore.runs import numbers
from tests.warpcore.test_block_swap import Streams, chain
from tools import memory
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError
from warpcore.meta import PeakMemory
from warpcore.placement import Placement
from warpcore.planning import USABLE, Plan
from warpcore.rehearsal import Rehearsal, bucket_sizes
from warpcore.sharded import stored_bytes

pytestmark = pytest.mark.integration
SCRIPTS = [name for name in SETTINGS if "swap_blocks" in use_case(name).Config.model_fields]
KEYS = {"activation_checkpointing": 3, "swap_blocks": 4}
FEWER = {"train_cosmos_lora": {"swap_blocks": 2}}  # which has no more of them here
GIB = 2**30


def keys(name: str) -> dict:
    return KEYS | FEWER.get(name, {})


@pytest.mark.bits
@pytest.mark.parametrize("name", represented_by("train_pixart_lora", of=SCRIPTS))
def test_no_bit_of_a_run_changes_and_it_resumes_exactly(settings, name):  # noqa: F811
    waiting = []

    class Seen(use_case(name)):
        def make_networks(self, saved=None):
            super().make_networks(saved)
            waiting.append(sum(swap.nbytes for swap in self.block_swaps.values()))

    here, away = settings(name, "here", activation_checkpointing=3), settings(name, "away", **keys(name))
    train(name, away | {"updates": 2}, Seen)
    assert numbers(train(name, away, Seen)) == numbers(train(name, here))
    assert len(waiting) == 2
    assert all(waiting)
    ours, theirs = files(away), files(here)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[file][key], t) for file, tensors in theirs.items() for key, t in tensors.items())


@pytest.mark.parametrize("name", represented_by("train_pixart_lora", of=SCRIPTS))
def test_nothing_waits_for_a_gpu(settings, name, monkeypatch):  # noqa: F811
    Streams(monkeypatch)
    # In float32: what stands for autocast ends before blocks compute again.
    train_on_gpu(name, settings(name, "update", **keys(name)), torch.float32)


def plan(settings, name: str, **changes) -> Plan:  # noqa: F811
    given = settings(name, "planned", **{"batch_size": 2, "image_size": 96} | changes)
    given.pop("train_tokens", None)
    return Plan(use_case(name), make_config(use_case(name).Config, given), "cpu")


@pytest.mark.parametrize("name", represented_by("train_pixart_lora", of=SCRIPTS))
def test_what_is_counted_is_what_an_update_takes(settings, name):  # noqa: F811
    counted, measured = [], []
    for swapped in (0, keys(name)["swap_blocks"]):
        planned = plan(settings, name, activation_checkpointing=3, swap_blocks=swapped)
        with planned.shapes({}) as shapes:
            size = bucket_sizes(shapes.run)[0]
            counted.append(shapes.needs(size, 2))
            waiting = [swap.nbytes for swap in shapes.run.block_swaps.values()]
        with Rehearsal(use_case(name), planned.config, memory_limit=GIB) as rehearsal:
            living = [*rehearsal.living()]
            with PeakMemory(living) as memory_of:
                for _ in range(3):  # in two of them, it learns the order of the blocks
                    memory_of.peak = memory_of.alive
                    rehearsal.update(size, 2)
            measured.append(memory_of.peak + sum(map(stored_bytes, living)))
    here, away = counted
    assert here.frozen - away.frozen == away.on_cpu - here.on_cpu == sum(waiting) > 0
    for needs, peak in zip(counted, measured, strict=True):
        assert needs.total + needs.on_cpu == pytest.approx(peak, rel=0.02)


@pytest.mark.slow
def test_as_few_blocks_as_fit_are_suggested(settings, capsys):  # noqa: F811
    planned = plan(settings, "train_pixart_lora", ema_start_iters=None, batch_size=1)
    cheaper = {"offload": ["encoders", "activations"], "activation_checkpointing": 3}
    needs = {count: planned.needs(cheaper | {"swap_blocks": count}) for count in (3, 4)}
    memory.suggest(planned, 1.0001 * needs[4].total / USABLE)
    assert needs[3].total > 1.01 * needs[4].total
    told = capsys.readouterr().out
    assert "swap_blocks=4" in told
    assert "weights of the frozen network travel to the GPU twice in each pass" in told


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"activation_checkpointing": 2}, "write activation_checkpointing: 3"),
        ({"compile": "graphs"}, "write compile: blocks, or remove swap_blocks"),
        ({"use_fsdp": True, "fsdp_cpu_offload": True}, "move the same weights: remove one"),
    ],
)
def test_what_cannot_go_with_it_is_refused(settings, keys, problem):  # noqa: F811
    with pytest.raises(ConfigError, match=f"swap_blocks.*{problem}"):
        make_config(use_case("train_c_lora").Config, settings("train_c_lora", "refused", **KEYS | keys))


def test_several_processes_are_refused(settings):  # noqa: F811
    config = make_config(use_case("train_c_lora").Config, settings("train_c_lora", "refused", **KEYS))
    placement = Placement(config, torch.device("cpu"), torch.float32, mesh=object())
    network = chain()
    with pytest.raises(UserError, match=r"one process alone; over several, write use_fsdp: true"):
        placement.place_trained("chain", network, 3)
