"""Weights in texts, `(word:1.2)`, as other programs have them: here all of it is text, which people are told."""

import re
from collections.abc import Iterable

from warpcore.text import counted, shortened

WEIGHT = re.compile(r"\([^()]*[^()\d\s]\s*:\s*\d+(?:\.\d+)?\s*\)")


def has_weights(text: str) -> bool:
    """Whether something in it looks like `(word:1.2)`."""
    return WEIGHT.search(text) is not None


def about_weights(prompts: Iterable[str]) -> list[str]:
    """A line about the prompts that have weights; none where there are no such."""
    found = [prompt for prompt in dict.fromkeys(prompts) if has_weights(prompt)]
    if not found:
        return []
    return [f"weights such as {WEIGHT.search(found[0])[0]} are read as text, brackets and numbers included: in "
            f"{counted(len(found), 'prompt')} ({shortened(found[0], 60)})"]  # fmt: skip
