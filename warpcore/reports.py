"""What a run reports of its updates, and how it ends where its data can't be read: saved, at its last good update."""

import math
from typing import TYPE_CHECKING

from warpcore.errors import UserError

if TYPE_CHECKING:
    from warpcore.core import WarpCore


def report(run: "WarpCore", save: bool) -> None:
    """Write the metrics, the only place where training waits for numbers from the device, and save if asked to.

    The save comes before all that can fail or take long: trackers, and the end of the run for what was counted.

    Raises:
        UserError: too many updates or samples in a row were unusable. Those samples stay behind: that is saved too.
    """
    lines = run.metrics.flush()
    alerts, too_many_updates = _count_nonfinite(run, lines)
    notes, too_many_samples = run.feed.report()
    if save or too_many_samples:
        with run.metrics.not_training():
            run._save()
    for line in lines:
        run.progress.show(line)
        run.tracker.log(line["update"], {k: v for k, v in line.items() if isinstance(v, int | float)})
    for alert in alerts:
        run.tracker.alert("not finite", alert)
        run.progress.say(alert)
    for note in notes:
        run.progress.say(note)
    for problem in (too_many_updates, too_many_samples):
        if problem:
            raise problem


def _count_nonfinite(run: "WarpCore", lines: list[dict]) -> tuple[list[str], UserError | None]:
    """Messages about updates that were skipped, and what to end with where there were too many in a row."""
    alerts, problem = [], None
    for line in lines:
        finite = math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
        run.nonfinite_updates = 0 if finite else run.nonfinite_updates + 1
        if not finite:
            alerts.append(
                f"update {line['update']} was skipped: no finite gradient ({run.nonfinite_updates} in a row)"
            )
        if problem is None and run.nonfinite_updates >= run.config.max_nonfinite_updates:
            problem = UserError(
                f"{run.nonfinite_updates} updates in a row, up to {line['update']}, had a loss or gradient that "
                "is not finite (max_nonfinite_updates). Lower lr, set clip_grad_norm, or use dtype: float32"
            )
    return alerts, problem


def undo_unread(run: "WarpCore") -> Exception | None:
    """What any process could not read of its data, if so (collective): the error that the run has to end with.

    The updates made without that data, which have changed no weights, are taken back on all processes.
    """
    fault = run.feed.find_fault()
    if fault is None:
        return None
    run.update, error = fault
    run.feed.rewind(run.update)
    run.metrics.forget(run.update)
    return error
