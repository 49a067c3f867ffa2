"""Post-hoc EMA: averages of any length out of snapshots of two, against the average over a whole stored history."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from families.common.weight_files import files_of, weights_in
from tests.many_processes import launch_processes
from tests.warpcore.runs import numbers, read_metrics, tiny_settings, train_here, write_shard
from tools.average import AverageSettings, average
from warpcore.config import ConfigError
from warpcore.ema import EMA, PowerProfile
from warpcore.errors import UserError
from warpcore.post_hoc_ema import Profile, coefficients, inner_products


def exact_shares(profile: Profile) -> np.ndarray:
    """The share of the weights of each update from 1 on: the profile's integral over (t - 1, t)."""
    exponent = PowerProfile(profile.sigma_rel).exponent
    times = np.arange(profile.update + 1) / profile.update
    return np.diff(times ** (exponent + 1))


def test_inner_products_are_the_integrals_of_the_profiles():
    profiles = [Profile(10, 0.05), Profile(10, 0.1), Profile(4, 0.1), Profile(7, 0.2)]

    def density(profile: Profile, times: np.ndarray) -> np.ndarray:
        exponent = PowerProfile(profile.sigma_rel).exponent
        inside = (exponent + 1) * times**exponent / profile.update ** (exponent + 1)
        return np.where(times <= profile.update, inside, 0.0)

    times = (np.arange(1_000_000) + 0.5) / 100_000
    densities = np.stack([density(profile, times) for profile in profiles])
    np.testing.assert_allclose(inner_products(profiles, profiles), densities @ densities.T / 100_000, rtol=1e-4)


def test_an_average_of_another_length_is_that_over_the_whole_history():
    """Weights that walk about: the worst that real ones do is to move as much in every update."""
    updates, every, width = 600, 30, 200
    history = torch.randn(updates, width, generator=torch.Generator().manual_seed(0)).cumsum(dim=0)
    weight = nn.Parameter(torch.zeros(width))
    averages = {sigma: EMA({"w": weight}, start=0, every=1, beta=PowerProfile(sigma)) for sigma in (0.05, 0.1)}
    snapshots = {}
    for update in range(1, updates + 1):
        weight.data.copy_(history[update - 1])
        for sigma, one in averages.items():
            one.step(update)
            if update % every == 0:
                snapshots[Profile(update, sigma)] = one.state_dict()["w"].clone()

    def exact(profile: Profile) -> torch.Tensor:
        return torch.from_numpy(exact_shares(profile)) @ history[: profile.update].double()

    for profile, taken in snapshots.items():
        torch.testing.assert_close(taken.double(), exact(profile), rtol=1e-4, atol=1e-3)
    stacked = torch.stack(list(snapshots.values())).double()
    apart = (exact(Profile(updates, 0.05)) - exact(Profile(updates, 0.1))).norm()
    for wanted in (Profile(600, 0.03), Profile(600, 0.07), Profile(600, 0.15), Profile(600, 0.2), Profile(450, 0.08)):
        shares, error = coefficients(list(snapshots), wanted)
        assert shares.sum() == pytest.approx(1)
        assert error < 0.05
        difference = (torch.from_numpy(shares) @ stacked - exact(wanted)).norm()
        assert difference < 0.03 * apart, wanted
    shares, error = coefficients(list(snapshots), Profile(450, 0.1))  # one of the snapshots
    assert error < 1e-3
    torch.testing.assert_close(torch.from_numpy(shares) @ stacked, exact(Profile(450, 0.1)), rtol=1e-3, atol=1e-2)


def of_run(tmp_path: Path, data: Path, **changes) -> dict:
    keys = {"updates": 16, "save_every": 16, "backup_every": 1, "post_hoc_ema": {"every": 2}, "dropout": 0.0}
    return tiny_settings(tmp_path, data, **keys | changes)


def snapshots(settings: dict) -> dict[str, dict[str, torch.Tensor]]:
    folder = Path(settings["checkpoint_path"]) / settings["experiment_id"] / "post_hoc"
    return {str(path.relative_to(folder)): load_file(path) for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.integration
@pytest.mark.bits
def test_a_run_gives_averages_of_any_length_and_resumes_exactly(tmp_path, capsys):
    data = write_shard(tmp_path / "a.tar", 12)
    whole = of_run(tmp_path, data)
    train_here(whole)
    assert "post_hoc_ema: 8 snapshots of " in capsys.readouterr().err
    taken = snapshots(whole)
    assert list(taken) == [
        f"{update:08d}/{sigma}/generator.safetensors" for update in range(2, 17, 2) for sigma in (0.05, 0.1)
    ]
    run, target = tmp_path / "tiny", tmp_path / "made"
    error = average(run, target, AverageSettings(sigma_rel=0.08))
    assert 0 < error < 0.1
    made = load_file(target / "generator.safetensors")
    history = [load_file(run / "backups" / f"{update:08d}" / "generator.safetensors") for update in range(1, 17)]

    def exact(sigma_rel: float, name: str) -> torch.Tensor:
        values = torch.stack([weights[name] for weights in history]).double()
        return torch.tensordot(torch.from_numpy(exact_shares(Profile(16, sigma_rel))), values, dims=1)

    for name, tensor in made.items():
        apart = (exact(0.05, name) - exact(0.1, name)).norm()
        assert (tensor.double() - exact(0.08, name)).norm() < 0.1 * apart
        for sigma_rel in (0.05, 0.1):
            snapshot = taken[f"00000016/{sigma_rel}/generator.safetensors"][name]
            assert (snapshot.double() - exact(sigma_rel, name)).norm() < 1e-3 * apart
    again = tmp_path / "again"
    average(run, again, AverageSettings(sigma_rel=0.1, update=10))
    for name, tensor in load_file(again / "generator.safetensors").items():
        torch.testing.assert_close(tensor, taken["00000010/0.1/generator.safetensors"][name], rtol=1e-4, atol=1e-5)

    halves = whole | {"experiment_id": "halves"}
    train_here(halves | {"updates": 7})
    train_here(halves)
    assert numbers(read_metrics(halves)) == numbers(read_metrics(whole))
    for name, tensors in snapshots(halves).items():
        if not name.startswith("00000007"):  # the end of the first half
            assert all(torch.equal(tensors[key], tensor) for key, tensor in taken[name].items()), name
    with pytest.raises(UserError, match="move that folder elsewhere"):
        train_here(halves | {"updates": 18, "post_hoc_ema": {"every": 2, "sigma_rel": [0.05, 0.2]}})


@pytest.mark.slow
@pytest.mark.integration
def test_snapshots_of_sharded_weights_are_those_of_one_process(tmp_path):
    data = write_shard(tmp_path / "a.tar", 12)
    keys = {"updates": 6, "backup_every": None, "save_every": 6, "micro_batch_size": 2, "export_file_gb": 1e-6}
    one, two = of_run(tmp_path / "one", data, **keys), of_run(tmp_path / "two", data, use_fsdp=True, **keys)
    train_here(one)
    launch_processes(2, _train, two)
    ours, theirs = snapshots(two), snapshots(one)
    assert ours.keys() == theirs.keys()
    assert any("-of-" in name for name in ours)
    for name, tensors in theirs.items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(ours[name][key], tensor, rtol=0, atol=1e-5)
    average(tmp_path / "two" / "tiny", tmp_path / "made", AverageSettings(sigma_rel=0.1, update=4))
    parts = files_of(weights_in(tmp_path / "made", "generator"))  # as inference finds them
    for part in parts:
        for key, tensor in load_file(part).items():
            torch.testing.assert_close(tensor, ours[f"00000004/0.1/{part.name}"][key], rtol=1e-4, atol=1e-4)


def _train(settings: dict) -> None:
    assert train_here(settings)[0] == 0


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"sigma_rel": [0.05, 0.1]}, "every"),
        ({"every": 10, "sigma_rel": [0.1, 0.1]}, "one average twice"),
        ({"every": 10, "sigma_rel": [0.1, 0.4]}, "0.28"),
        ({"every": 0}, "every"),
    ],
)
def test_a_mistake_in_the_key_is_named(given, told, tmp_path):
    with pytest.raises(ConfigError, match=told):
        train_here(tiny_settings(tmp_path, tmp_path, post_hoc_ema=given))


def test_what_cannot_be_averaged_says_why(tmp_path):
    with pytest.raises(UserError, match="name the folder of a training run"):
        average(tmp_path, tmp_path / "new", AverageSettings(sigma_rel=0.1))
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="train with post_hoc_ema"):
        average(tmp_path, tmp_path / "new", AverageSettings(sigma_rel=0.1))
    for sigma in ("0.05", "0.1"):
        (tmp_path / "post_hoc" / "00000010" / sigma).mkdir(parents=True)
    with pytest.raises(UserError, match="too far from all sums of the 2 snapshots"):
        average(tmp_path, tmp_path / "new", AverageSettings(sigma_rel=0.25))
    with pytest.raises(UserError, match="after the last snapshot, of update 10"):
        average(tmp_path, tmp_path / "new", AverageSettings(sigma_rel=0.1, update=11))
    (tmp_path / "post_hoc" / "00000010" / "0.1" / "generator.safetensors").touch()
    with pytest.raises(UserError, match=r"0.05 lacks weights that .*0.1 has"):
        average(tmp_path, tmp_path / "new", AverageSettings(sigma_rel=0.08))
