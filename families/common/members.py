"""Members that lie beside a sample's picture for readers that want them: masks, and what ControlNet filters look at.

The data set builder packs these, so a reader that is added here, or to `FILTERS`, is served without further ado.
"""

import inspect

from modules.filters import FILTERS

MASK = "mask.png"
"""White where a picture is learnt, see `masked_loss`."""


def _looked_at(kind: type) -> str | None:
    member = inspect.signature(kind).parameters.get("member")
    return member.default if member else None


SIDE_MEMBERS: tuple[str, ...] = (MASK, *sorted({member for kind in FILTERS.values() if (member := _looked_at(kind))}))
"""Their extensions: `mask.png`, `depth.png`, `pose.json`, `seg.png`."""
