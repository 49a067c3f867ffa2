"""Rules that hold for every line of the project's code."""

import ast
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def calls(source: str) -> Iterator[tuple[ast.Call, str, str | None]]:
    """Each call in a file, with the name that is called, and of a method (else None) the name before the dot or ""."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute):
            yield call, call.func.attr, getattr(call.func.value, "id", "")
        else:
            yield call, getattr(call.func, "id", ""), None


def mode_of_open(call: ast.Call, owner: str | None) -> str:
    """The mode of a call of `open`: of a path it comes first, of the built-in function second."""
    arguments = [getattr(argument, "value", "?") for argument in call.args[1 if owner is None else 0 :]]
    return str(arguments[0] if arguments else "r")


def lines_found(folders: Sequence[str], find: Callable[[str], list[int]], but: Collection[str] = ()) -> list[str]:
    """`file:line` of what `find` finds in the source of every Python file of the folders, but for some files."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [
        f"{path.relative_to(ROOT)}:{line}"
        for path in paths
        if path.relative_to(ROOT).as_posix() not in but
        for line in find(path.read_text(encoding="utf-8"))
    ]
