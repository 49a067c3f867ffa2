"""Commands for what comes after a training, as its scripts tell them at its end."""

import json
import shlex
from typing import Any

from families.common.family import SCRIPTS
from warpcore.config import Config
from warpcore.data.buckets import whole_size

PLACEHOLDER = "YOUR PROMPT"


def drawing_commands(task: str, config: Config, **keys: Any) -> list[str]:
    """The command of the inference script for a task, out of a run; none of a run on S3, which it does not read.

    keys: further keys of the script; those that are None are left out.
    """
    if config.run_url is not None:
        return []
    given = {"run": str(config.run_folder)} | {key: value for key, value in keys.items() if value is not None}
    words = [f"{key}={one if isinstance(one, str) else json.dumps(one, ensure_ascii=False)}"
             for key, one in given.items()]  # fmt: skip
    return [f"to draw with it: python3 {SCRIPTS[task]} {shlex.join(words)}"]


def size_keys(config: Config, scale: float = 1.0) -> dict[str, Any]:
    """The keys of an inference script that say the size of a run's pictures, times `scale`."""
    height, width = (round(side * scale) for side in whole_size(config.image_size))
    return {"image_size": height} if height == width else {"size": [height, width]}


def first_prompt(config: Any) -> list[str]:
    """The first prompt of a run's samples, or a word in its place: what `prompts` of a command may be."""
    return [config.sample_prompts[0] if config.sample_prompts else PLACEHOLDER]
