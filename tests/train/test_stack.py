"""An update can be read in one sitting: few calls lie between a script's `main` and the network that it trains."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from tests.train.test_every_script import SETTINGS, settings, use_case  # noqa: F401

PROJECT = Path(__file__).parents[2]
MAX_FRAMES = 6
CALLED_ELSEWHERE = {"tokens", "tokens_2", "text", "repa_projector"}
"""Text encoders, which `encode` calls, and rows of their tables, which are looked up deep inside them; and what REPA
puts on the tokens of the network after its forward pass."""


def project_frames() -> list[str]:
    """The functions of the project on the stack, outermost first, those of tests left out."""
    names, frame = [], sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PROJECT) and path.relative_to(PROJECT).parts[0] not in ("tests", ".venv"):
            names.append(frame.f_code.co_qualname)
        frame = frame.f_back
    return names[::-1]


@pytest.mark.integration
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_six_functions_at_most_from_main_to_a_trained_network(settings, name, tmp_path, monkeypatch):  # noqa: F811
    stacks: dict[str, list[str]] = {}
    watched: set[str] = set()

    class Watched(use_case(name)):
        def build(self) -> dict[str, torch.nn.Module]:
            networks = super().build()
            watched.update(self.trainable.keys() | ({"generator"} & networks.keys()))
            for network in watched:
                networks[network].register_forward_pre_hook(partial(record, network))
            return networks

    def record(network: str, module: torch.nn.Module, inputs: tuple) -> None:
        stacks.setdefault(network, [*project_frames(), type(module).forward.__qualname__])

    given = settings(name, "stack", updates=2, validation_samples=0, ema_start_iters=None)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["train.py", str(tmp_path / "config.yaml")])
    monkeypatch.setattr(Watched, "sample", lambda self, held_out: [])
    with pytest.raises(SystemExit, match="0"):
        Watched.main()
    assert stacks.keys() == watched
    for network in stacks.keys() - CALLED_ELSEWHERE:
        assert stacks[network][:3] == ["WarpCore.main", "WarpCore.run", "WarpCore.make_update"]
        assert len(stacks[network]) <= MAX_FRAMES, stacks[network]
