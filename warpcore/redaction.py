"""Credentials are left out of all that is told and written: errors, tracebacks, logs, progress, trackers.

`redact` is the one place that knows what they look like. `UserError`, `Progress`, the trackers and, after
`redact_output`, log lines and tracebacks go through it.
"""

import logging
import os
import re
import sys
import threading
import traceback
from types import TracebackType

HIDDEN = "***"
SECRET_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY",
)  # fmt: skip
"""Their values are hidden wherever they occur."""
CREDENTIALS_ELSEWHERE = (
    "For s3://, set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_ENDPOINT_URL for another place "
    "than AWS)"
)
"""Where they belong, as the end of a message."""
LEAST_SECRET_LENGTH = 8
"""Shorter values are hidden only where their place shows what they are: they may be ordinary words."""
# Lengths are bounded, so that no text takes long.
_USER = re.compile(
    r"""([a-z][a-z0-9+.-]{0,20}://)  # then a user and a password, which may hold slashes; or a user alone
    (?:[^/\s"'<>@:]{0,200}:(?!\d{1,5}(?:[/?\#\s"']|$))[^\s"'<>]{0,500}|[^/\s"'<>]{0,500})@""",
    re.IGNORECASE | re.VERBOSE,
)
_QUERY = re.compile(
    r"""([?&](?:X-(?:Amz|Goog)-[\w-]+|Signature|Policy|Key-Pair-Id|AWSAccessKeyId|GoogleAccessId|sig|token|access_token
    |auth|api_?key|key|secret|password)=)[^&\s"'<>\#]+""",
    re.IGNORECASE | re.VERBOSE,
)
_TOKEN = re.compile(r"\b(?:hf_\w{20,}|wandb_v\d_\w{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}\b)")


def redact(text: str) -> str:
    """The text with HIDDEN in place of credentials: in URLs, by the form of tokens, and values of SECRET_VARIABLES."""
    text = _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(rf"\1{HIDDEN}@", text))
    text = _TOKEN.sub(HIDDEN, text)
    for value in filter(None, map(os.environ.get, SECRET_VARIABLES)):
        if len(value) >= LEAST_SECRET_LENGTH:
            text = text.replace(value, HIDDEN)
    return text


def has_credentials(url: str) -> bool:
    """Whether a URL, or one of several in a text, names a user or is signed."""
    return bool(_USER.search(url)) or ("://" in url and bool(_QUERY.search(url)))


def redact_output() -> None:
    """Hide credentials in the log lines and tracebacks of this process from now on."""
    logging.setLogRecordFactory(_RedactedRecord)
    sys.excepthook = _print_traceback
    threading.excepthook = lambda caught: _print_traceback(caught.exc_type, caught.exc_value, caught.exc_traceback)


class _RedactedRecord(logging.LogRecord):
    def getMessage(self) -> str:
        return redact(super().getMessage())


def _print_traceback(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr, flush=True)
