"""What a run reports of its updates, and when updates that were skipped are too many."""

import math
from collections.abc import Sequence

from warpcore.errors import UserError
from warpcore.loss_scale import FLOOR
from warpcore.progress import Progress
from warpcore.tracking import Tracker


class SkippedUpdates:
    """Counts updates in a row that were skipped, as their loss or gradient was not finite.

    in_parts: they are made tensor by tensor in the backward pass, up to such a gradient (`fused_backward`).
    """

    def __init__(self, max_in_a_row: int, in_a_row: int = 0, in_parts: bool = False):
        self.max_in_a_row, self.in_a_row, self.in_parts = max_in_a_row, in_a_row, in_parts

    def count(self, lines: Sequence[dict]) -> tuple[list[str], UserError | None]:
        """Messages about those among updates, and the error to end with where there were too many.

        lines: of the metrics.
        """
        alerts, problem = [], None
        for line in lines:
            if math.isnan(line["loss"]) and line["grad_norm"] == 0:  # as its samples, which have a limit of their own
                alerts.append(f"update {line['update']} was skipped: none of its samples could be read")
                continue
            finite = math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
            if not finite and math.isfinite(line["loss"]) and line.get("loss_scale", FLOOR) > FLOOR:
                continue  # float16 gradients overflowed, which a smaller factor on the loss will change
            self.in_a_row = 0 if finite else self.in_a_row + 1
            if not finite:
                in_part = self.in_parts and math.isfinite(line["loss"])
                skipped = "was made in part, and the rest skipped" if in_part else "was skipped"
                alerts.append(f"update {line['update']} {skipped}: no finite gradient ({self.in_a_row} in a row)")
            if problem is None and self.in_a_row >= self.max_in_a_row:
                problem = UserError(
                    f"{self.in_a_row} updates in a row, up to {line['update']}, had a loss or gradient that "
                    "is not finite (max_nonfinite_updates). Lower lr, set clip_grad_norm, or use dtype: float32"
                )
        return alerts, problem


def show(
    lines: Sequence[dict], alerts: Sequence[str], notes: Sequence[str], progress: Progress, tracker: Tracker
) -> None:
    """Show lines of the metrics, alerts, and notes about the data, in the progress bar and the trackers."""
    for line in lines:
        progress.show(line)
        tracker.log(line["update"], {k: v for k, v in line.items() if isinstance(v, int | float)})
    for alert in alerts:
        tracker.alert("not finite", alert)
        progress.say(alert)
    for note in notes:
        progress.say(note)
