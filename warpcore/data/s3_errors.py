"""What S3 says when it refuses: status, code and message, from boto3's and obstore's errors."""

import re

from botocore.exceptions import ClientError

from warpcore.text import shortened

MAX_TOLD = 500
"""Characters of each part of an answer in an error message."""
CREDENTIALS = (
    "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_ENDPOINT_URL for another place than AWS); "
    "AWS_SKIP_SIGNATURE=true reads a public bucket without any, AWS_REQUEST_PAYER=requester one whose readers pay"
)
_HISTORY = "\n\nDebug source:"
"""Where obstore's message ends and what it tried begins."""


def status_of(error: Exception) -> int:
    """The HTTP status of an error of boto3 or obstore; 0 where there was no answer."""
    if isinstance(error, ClientError):
        return error.response["ResponseMetadata"]["HTTPStatusCode"]
    found = re.search(r"status code: (\d{3})", str(error).split(_HISTORY)[0])
    return int(found[1]) if found else 0


def is_refused(status: int, text: str) -> bool:
    """Whether other credentials may get another answer.

    text: the error's. An expired token is a 400, like mistakes that are not about credentials; so is the answer to a
    HEAD, which has no body to say what it is.
    """
    return status in (401, 403) or (status == 400 and bool(re.search(r"Token|\(400\)", text)))


def refusal_hint(status: int, text: str) -> str:
    """What to do about an error, as the end of its message; empty where it is not about credentials."""
    if not is_refused(status, text):
        return ""
    return f". Credentials were looked up again, and the present ones are refused. {CREDENTIALS}"


def brief(error: Exception) -> str:
    """An error of obstore with S3's code and message, without its XML and its history."""
    text = str(error).split(_HISTORY)[0]
    head, *xml = re.split(r"\s*(?=<\?xml|<Error>)", text, maxsplit=1)
    return ": ".join(
        filter(None, [shortened(head.split("\n", 1)[0], MAX_TOLD).strip().rstrip(":"), reason("".join(xml))])
    )


def reason(xml: str) -> str:
    """The code and the message in the body of an answer: `ExpiredToken: The provided token has expired`."""
    parts = (re.search(rf"<{name}>(.*?)</{name}>", xml, re.DOTALL) for name in ("Code", "Message"))
    return ": ".join(shortened(part[1], MAX_TOLD).strip().rstrip(".") for part in parts if part)
