"""What a line of prompts asks for: texts along a long video, scores, references and where their frames go.

    a jeep on a beach
    |0|a jeep on a beach|2|the jeep in a forest
    waves at sunset{"reference_path": "wave.png", "mask_strategy": "0"}

The grammar is that of Open-Sora. `|LOOP|text` says from which clip of a long video on a text holds.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from families.common.mask_strategies import Placement, parse_mask_strategy
from warpcore.errors import UserError
from warpcore.safe_json import parse_json
from warpcore.text import shortened

JSON_KEYS = ("reference_path", "mask_strategy")
EXAMPLE = 'such as a sunrise{"reference_path": "wave.png", "mask_strategy": "0"}'
_LOOP_MARK = re.compile(r"\|\s*\d+\s*\|")


@dataclass(frozen=True)
class ClipPrompt:
    """What is drawn: texts, and frames that are given."""

    title: str
    """The prompt without its JSON: what files are called after."""
    texts: tuple[tuple[int, str], ...]
    """(loop, text) each, rising from loop 0: a text holds from that clip of a long video on."""
    references: tuple[str, ...] = ()
    """Paths or URLs of pictures and videos."""
    placements: tuple[Placement, ...] = ()

    def text_of(self, loop: int) -> str:
        """The text of a clip of a long video."""
        return [text for start, text in self.texts if start <= loop][-1]

    def mapped(self, change: Callable[[str], str]) -> "ClipPrompt":
        """With each text changed."""
        return replace(self, texts=tuple((loop, change(text)) for loop, text in self.texts))


def parse_prompt(line: str, reference_path: str = "", mask_strategy: str = "") -> ClipPrompt:
    """What a line of prompts asks for.

    Args:
        reference_path, mask_strategy: those of a line that names none.

    Raises:
        UserError: braces, loops or a strategy are wrong; the message shows the place.
    """
    where = f"prompt {shortened(line, 80)!r}"
    prompt, brace, rest = line.partition("{")
    if "}" in prompt:
        raise UserError(f"{where}: a }} comes before any {{; JSON at its end is written {EXAMPLE}")
    given = _json(brace + rest, where) if brace else {}
    references = given.get("reference_path", reference_path)
    try:
        placements = parse_mask_strategy(given.get("mask_strategy", mask_strategy))
    except UserError as error:
        raise UserError(f"{where}: {error}" if "mask_strategy" in given else str(error)) from None
    paths = tuple(path.strip() for path in references.split(";")) if references.strip() else ()
    if "" in paths:
        raise UserError(f"{where}: reference_path {references!r} has an empty part; write paths, separated by ;")
    return ClipPrompt(prompt.strip(), _split(prompt, where), paths, tuple(placements))


def _json(text: str, where: str) -> dict[str, str]:
    """The texts in the JSON at the end of a line."""
    shown = repr(shortened(text, 120))
    if not text.rstrip().endswith("}"):
        raise UserError(
            f"{where}: JSON at its end begins with {{ and has no }} at the end: {shown}; write it {EXAMPLE}"
        )
    try:
        found = parse_json(text, each_key_once=True)
    except ValueError as error:
        raise UserError(f"{where}: {shown} is no JSON ({error}); write one {{...}} at its end, {EXAMPLE}") from None
    wrong = [key for key, value in found.items() if key not in JSON_KEYS or not isinstance(value, str)]
    if wrong:
        raise UserError(
            f"{where}: {wrong[0]!r} in {shown}; the JSON of a prompt holds texts, under {' and '.join(JSON_KEYS)}"
        )
    return found


def _split(prompt: str, where: str) -> tuple[tuple[int, str], ...]:
    """The texts of a prompt, with the loop from which each holds."""
    marks = list(_LOOP_MARK.finditer(prompt))
    if not prompt.lstrip().startswith("|"):
        if marks:
            raise UserError(f"{where}: {marks[0][0]} comes after a text; begin with |0|: |0|text{marks[0][0]}text")
        return ((0, prompt.strip()),)
    parts = prompt.strip().split("|")[1:]
    texts = []
    for number, text in zip(parts[::2], [*parts[1::2], None], strict=False):
        if not number.strip().isdecimal() or len(number) > 9:
            raise UserError(f"{where}: {number!r} stands where a loop does; write |0|text|2|text, and no | in texts")
        if text is None or not text.strip():
            raise UserError(f"{where}: no text behind |{number}|; write |{number}|text")
        texts.append((int(number), text.strip()))
    loops = [loop for loop, _ in texts]
    if loops[:1] != [0] or loops != sorted(set(loops)):
        said = ", ".join(map(str, loops)) or "none"
        raise UserError(f"{where}: its loops are {said}; they begin with 0 and rise: |0|text|2|text")
    return tuple(texts)


def append_scores(
    text: str, aes: float | None = None, flow: float | None = None, camera_motion: str | None = None
) -> str:
    """A text as captions of the training are written: with an aesthetic score, a motion score, and how the camera
    moves; what the text says already stays as it is."""
    told = {
        "aesthetic score": None if aes is None else f"{aes:.1f}",
        "motion score": None if flow is None else f"{flow:.1f}",
        "camera motion": camera_motion,
    }
    for name, value in told.items():
        if value is not None and f"{name}:" not in text:
            text = f"{text} {name}: {value}."
    return text
