"""Pictures and videos that dots in their names hide.

`a.b.jpg` is the member `b.jpg` of the key `a`, as `a.mask.png` is its mask. A row that has no picture of its
own and such a member is a problem of its own. Beside a picture, a member is taken for one of its own kind, as masks
are, where it is one of COMMON_KINDS, or where at least two samples of the tar have it, and a tenth of those that have
a picture. Any other is a hidden picture, which is named and counted.
"""

from collections import Counter
from collections.abc import Sequence

from warpcore.data.samples import COMMON_KINDS, VISUAL_EXTENSIONS, visual_member
from warpcore.data.tars import TarSample

DOTTED_NAME = "dots in the name of a picture"
"""The start of the problem of a row whose picture is taken for another kind of member."""
LEAST_SHARE = 0.1


def dotted(sample: TarSample) -> list[str]:
    """Its members that would be pictures or videos, were it not for a dot."""
    return [name for name in sample.members if "." in name and name.rpartition(".")[2] in VISUAL_EXTENSIONS]


def hidden_pictures(samples: Sequence[TarSample]) -> list[list[str] | None]:
    """Of every sample the members that are pictures hidden beside its own; None where there is none."""
    having = [dotted(sample) if visual_member(sample.members) else None for sample in samples]
    counts = Counter(name for names in having if names for name in names)
    least = max(2, LEAST_SHARE * sum(names is not None for names in having))
    kinds = {name for name, count in counts.items() if count >= least} | set(COMMON_KINDS)
    return [[name for name in names or () if name not in kinds] or None for names in having]


def as_read(key: str, names: Sequence[str]) -> str:
    """As what dotted names are read, for messages."""
    several = f", as are {len(names) - 1} more of this key" if len(names) > 1 else ""
    return f"{key}.{names[0]} is read as the member .{names[0]} of the key {key!r}{several}"
