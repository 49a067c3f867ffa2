"""Names that a glob matches: `*`, `?` and `[...]` stop at a slash, `**` does not."""

import re
from collections.abc import Iterable

from warpcore.errors import UserError
from warpcore.patterns import searching

MAX_SECONDS = 30.0
"""Of processor time; a million names take about one second."""


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """Those of the names that the pattern matches as a whole.

    Raises:
        UserError: what is in brackets is no set of letters, or the pattern takes too long.
    """
    names = list(names)
    parts = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    found = ""
    for piece in re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern):
        is_set = piece.startswith("[") and piece.endswith("]")
        found += re.sub(r"^\[!", "[^", piece.replace("\\", r"\\")) if is_set else parts.get(piece, re.escape(piece))
    try:
        fits = re.compile(found, re.DOTALL)
    except re.error as error:
        raise UserError(f"webdataset_path: {pattern}: what is in brackets is no set of letters: {error}") from None
    with searching(f"webdataset_path: {pattern}", seconds=MAX_SECONDS):
        return [name for name in names if fits.fullmatch(name)]
