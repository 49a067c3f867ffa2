"""A DiT of a few thousand weights under the name of the mini."""

import pytest

from families.dit import files, versions
from tests.families.dit.classed import SMALL


@pytest.fixture
def small_mini(monkeypatch):
    """`model_version: mini` is of the `SMALL` numbers, and files without any are known by their width."""
    mini = versions.Version(SMALL, versions.VERSIONS["mini"].autoencoder, image_size=32)
    monkeypatch.setitem(versions.VERSIONS, "mini", mini)
    monkeypatch.setitem(files.HEADS, SMALL["hidden_size"], SMALL["num_heads"])
    return mini
