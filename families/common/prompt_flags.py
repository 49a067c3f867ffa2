"""Flags that other programs read from a line of prompts, such as `--w 192`: here they would be drawn as words."""

import re
from typing import Annotated

from pydantic import AfterValidator

FLAGS = {
    "size": ("w", "h", "width", "height"),
    "aspect_ratio": ("ar",),
    "seeds": ("d", "seed"),
    "steps": ("s", "steps"),
    "guidance": ("l", "g", "cfg_scale"),
    "sampler": ("ss", "sampler_name"),
    "negative_prompt": ("n", "negative_prompt"),
}
"""By our key: flags of kohya's scripts, of AUTOMATIC1111's lists of prompts, and of Midjourney."""
OTHER_FLAGS = ("prompt", "t", "am", "bs", "cn", "ctr", "ow", "oh", "nw", "nh", "ct", "cl", "c", "f")
"""Flags of kohya's scripts for which there is no key of this kind."""
_KEYS = {flag: key for key, flags in FLAGS.items() for flag in flags}
_FLAG = re.compile(rf"(?:^|\s)--({'|'.join((*_KEYS, *OTHER_FLAGS))})(?=[\s=]|$)", re.IGNORECASE)


def without_flags(prompt: str) -> str:
    """The prompt itself. Raises ValueError where it holds flags of other programs."""
    if flags := list(dict.fromkeys(_FLAG.findall(prompt))):
        keys = list(dict.fromkeys(_KEYS[flag.lower()] for flag in flags if flag.lower() in _KEYS))
        raise ValueError(
            f"{', '.join(f'--{flag}' for flag in flags)} would be drawn as words: flags of other programs are not "
            "read from prompts. Remove them"
            + (f"; for all prompts of inference/text_to_image.py there are the keys {', '.join(keys)}" if keys else "")
        )
    return prompt


Prompt = Annotated[str, AfterValidator(without_flags)]
"""What to draw."""
