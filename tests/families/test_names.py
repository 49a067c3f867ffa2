"""Tools, inference scripts, scores of minis, the engine, the networks and what families share name no family."""

import ast
from pathlib import Path

from families.registry import families

ROOT = Path(__file__).parents[2]
WITHOUT = [
    "tools",
    "inference",
    "warpcore",
    "modules",
    "families/common",
    "families/registry.py",
    "benchmarks/learning.py",
    "benchmarks/subject.py",
    "benchmarks/edges.py",
]
FILES = sorted(
    file for place in WITHOUT for file in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at its top or later."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_no_family_is_imported():
    own = tuple(f"families.{family.name}." for family in families())
    found = {
        path.relative_to(ROOT).as_posix() for path in FILES for name in imported(path) if f"{name}.".startswith(own)
    }
    assert not found
