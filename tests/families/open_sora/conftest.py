from dataclasses import replace
from pathlib import Path

import pytest

from families.open_sora.versions import VERSIONS
from tests.families.open_sora.tiny import SMALL, write_autoencoder


@pytest.fixture(scope="session")
def autoencoder_file(tmp_path_factory) -> Path:
    return write_autoencoder(tmp_path_factory.mktemp("autoencoder") / "vae.safetensors")


@pytest.fixture
def small_mini(monkeypatch, autoencoder_file) -> None:
    """Makes the mini smaller, with an autoencoder as the published one is."""
    version = replace(VERSIONS["mini"], network=SMALL, autoencoder=str(autoencoder_file))
    monkeypatch.setitem(VERSIONS, "mini", version)
