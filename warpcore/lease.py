"""An object on S3 that says which run writes below a prefix, so that no second one does.

The run that holds it renews it every RENEW_SECONDS. One that has not been written for LEASE_SECONDS, by the clock
of the endpoint (ours may jump), has run out: its run is gone. A step of a Slurm job that went back into the queue need
not wait for that: the same step of an earlier start of its job is gone.
"""

import json
import logging
import os
import socket
import threading
import time
import uuid
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from warpcore.data import s3_requests
from warpcore.data.s3_files import put_if, remove
from warpcore.data.s3_requests import ask, bare_etag, split
from warpcore.data.storage_protocol import StorageError
from warpcore.errors import UserError
from warpcore.safe_json import parse_json

LEASE_SECONDS = 60
RENEW_SECONDS = 10
LOOK_SECONDS = 1
"""How often a run looks whether a lease that stands in its way is still renewed."""

logger = logging.getLogger(__name__)
_SAID = {"owner": str, "restarts": int, "token": str, "who": str}


class LeaseError(UserError):
    """Another run writes here."""


@dataclass(frozen=True)
class _Found:
    """A lease as it is on S3."""

    etag: str
    age_seconds: float
    """Since it was written."""
    owner: str
    restarts: int
    token: str
    who: str


class Lease:
    """The lease at `url`, for the run called `name` in messages."""

    def __init__(self, url: str, name: str):
        self.url, self.name = url, name
        self.token = uuid.uuid4().hex
        job = os.environ.get("SLURM_JOB_ID")
        self.owner = f"{job}.{os.environ.get('SLURM_STEP_ID', '')}" if job else self.token
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
        self.who = f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else "")
        self._times_written = 0
        self._lost = False
        self._writing = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def take(self) -> None:
        """Become the one that writes.

        Raises:
            LeaseError: another run does.
            StorageError: S3 can't be reached, or refuses.
        """
        watched: str | None = None
        while True:
            found = self._find()
            if found is None or self._follows(found) or found.age_seconds > LEASE_SECONDS:
                if self._write(found and found.etag):
                    break
                continue  # another was quicker
            if watched is None:
                logger.warning(
                    "%s: another run (%s) wrote here %.0f seconds ago. Waiting up to %d seconds to see if it is gone",
                    self.name, found.who, found.age_seconds, LEASE_SECONDS,
                )  # fmt: skip
            elif found.etag != watched:
                raise LeaseError(
                    f"{self.name} is being written by another run ({found.who}): stop it, or choose another "
                    "experiment_id"
                )
            watched = found.etag
            time.sleep(LOOK_SECONDS)
        self._thread.start()

    def _follows(self, found: _Found) -> bool:
        """Whether it is of an earlier start of our Slurm job. Two launches in one step have the same owner, too."""
        return found.owner == self.owner and found.restarts < self.restarts

    def renew(self) -> None:
        """Write it once more, which shows that it is still ours. Raises LeaseError, StorageError."""
        with self._writing:
            found = self._find()
            ours = found is not None and found.token == self.token
            self._lost = self._lost or not (ours and self._write(found.etag))
        self.check()

    def check(self) -> None:
        """Raises LeaseError where another run has taken it."""
        if self._lost:
            raise LeaseError(f"another run took {self.name} over: this one stops, what it had not saved is not kept")

    def release(self) -> None:
        """Let others have it at once."""
        self._ending.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            found = self._find()
            if found and found.token == self.token:
                remove([self.url])
        except StorageError as error:  # it runs out by itself
            logger.warning("%s: the lease stays: %s", self.name, error)

    def _keep(self) -> None:
        while not self._ending.wait(RENEW_SECONDS):
            try:
                self.renew()
            except LeaseError:  # training learns of it when it looks
                return
            except StorageError as error:  # whether it is still ours is seen when S3 answers again
                logger.warning("%s: the lease can't be renewed: %s", self.name, error)

    def _write(self, etag: str | None) -> bool:
        """Write it where it is still of this etag; whether it is ours then."""
        self._times_written += 1
        content = {
            "owner": self.owner, "restarts": self.restarts, "token": self.token, "who": self.who,
            "times_written": self._times_written,
        }  # fmt: skip
        put_if(self.url, json.dumps(content).encode(), etag)
        # What is there decides: the answer may have been lost, and not every endpoint knows conditions.
        found = self._find()
        return found is not None and found.token == self.token

    def _find(self) -> _Found | None:
        while True:
            try:
                head = ask(self.url, "head_object", Key=split(self.url)[1])
                content, (_, etag) = s3_requests.get(self.url, 0, s3_requests.REQUEST_BYTES)
            except FileNotFoundError:
                return None
            if etag == bare_etag(head["ETag"]):
                break
        now = parsedate_to_datetime(head["ResponseMetadata"]["HTTPHeaders"]["date"])
        return _Found(etag, (now - head["LastModified"]).total_seconds(), **_said(content))


def _said(content: bytes) -> dict[str, Any]:
    """What a lease says of its run; one that cannot be read belongs to a run that nobody knows."""
    try:
        said = {"restarts": 0} | parse_json(content)
    except (ValueError, TypeError):
        said = {}
    if all(isinstance(said.get(name), kind) for name, kind in _SAID.items()):
        return {name: said[name] for name in _SAID}
    return {"owner": "", "restarts": 0, "token": "", "who": "unknown: its lease cannot be read"}
