"""Which text of a sample NOVA trains with: half of the time the long one, else a short one."""

import re

FIRST_SENTENCE = re.compile(r".*?[.!?](?=\s)")
"""A line break before its end ends the search."""
SHORT_SHARE = 0.5
"""How often the short text is taken."""


def short_text(caption: str, text: str = "") -> str:
    """The sample's own short text, else the first sentence of its caption, else the caption."""
    first = FIRST_SENTENCE.match(caption)
    return text or (first[0] if first else caption)


def chosen_text(caption: str, text: str, uniform: float) -> str:
    """The text that a sample is trained with, for a uniform draw."""
    return short_text(caption, text) if uniform < SHORT_SHARE else caption
