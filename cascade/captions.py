"""Captions that are longer than what a text encoder reads, and so lose their end."""

from modules.tokenizers import Tokenizer

CLIP_LENGTH = 77
"""Tokens that CLIP's text encoders read, the begin and end tokens included."""


def is_cut(tokenizer: Tokenizer, length: int, caption: str) -> bool:
    """Whether a caption loses its end in an encoder that reads `length` tokens, begin and end tokens included."""
    room = length - 2
    # A token stands for at least one byte: most captions need not be taken apart.
    return len(caption.lower().encode()) > room and len(tokenizer.encode(caption)) > room
