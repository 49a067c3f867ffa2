"""The search for a micro-batch size of every bucket of a `bucket_config`: by memory, or by equal time."""

from collections.abc import Callable, Mapping, Sequence

from warpcore.data.clip_buckets import Rung
from warpcore.errors import UserError
from warpcore.rehearsal import Rehearsal

GIB = 2**30
Entries = Mapping[str, Mapping[int, Sequence]]
"""A `bucket_config`."""


def search_between(
    lower: int, upper: int, seconds_of: Callable[[int], float | None], reference: float | None = None
) -> tuple[int, float]:
    """A micro-batch size from `lower` to `upper`, searched by halves, and its seconds; (0, 0.0) where none will do.

    Args:
        seconds_of: measures a size; None where memory is not enough.
        reference: seconds to come near to from below: where all buckets take as long, processes wait little for each
            other. Without it, the largest size that has enough memory is found.
    """
    best = 0, 0.0
    while lower <= upper:
        size = (lower + upper) // 2
        seconds = seconds_of(size)
        if seconds is None or (reference is not None and seconds >= reference):
            upper = size - 1
            continue
        if reference is None or not best[0] or reference - seconds < reference - best[1]:
            best = size, seconds
        lower = size + 1
    return best


def guess_and_range(size: int | Sequence[int], spread: int | None = None) -> tuple[int, int]:
    """Where the search of a bucket begins, and how far it goes: the pair, or `spread` around a single size."""
    if not isinstance(size, int):
        return tuple(size)
    return size, max(size // 2, 1) if spread is None else spread


def with_sizes(entries: Entries, found: Mapping[tuple[str, int], int]) -> dict[str, dict[int, list]]:
    """A `bucket_config` with other sizes, by resolution and frames; of those that are not there, guesses are sizes."""

    def size_of(name: str, num_frames: int, size: int | Sequence[int] | None) -> int | None:
        return found.get((name, num_frames), size if size is None else guess_and_range(size)[0])

    return {
        name: {
            frames: [list(keep) if isinstance(keep, Sequence) else keep, size_of(name, frames, size)]
            for frames, (keep, size) in lengths.items()
        }
        for name, lengths in entries.items()
    }


class ClipSearch:
    """Searches the buckets of a run, and prints what it tries.

    Args:
        entries: the `bucket_config`; sizes may be (guess, range) pairs.
        spread: how far from a size that is one number to search; by default half of it.
    """

    def __init__(self, rehearsal: Rehearsal, entries: Entries, spread: int | None = None):
        self.rehearsal, self.entries, self.spread = rehearsal, entries, spread
        run = rehearsal.run
        rungs = run.config.buckets(run.bucket_factor).rungs
        self.rungs = {(rung.resolution, rung.num_frames): rung for rung in rungs if rung.keep}
        self.found: dict[tuple[str, int], int] = {}
        self.without: list[str] = []
        """Buckets for which no size will do."""

    def search(self, resolution: str | None, base: tuple[str, int] | None, base_step_time: float | None) -> None:
        """Find the sizes of all buckets, or of one resolution's.

        Args:
            base: whose largest size gives the time of all others, where there is no `base_step_time` (seconds).

        Raises:
            UserError: there is no such resolution or bucket, or no size of the base will do.
        """
        wanted = [key for key in self.rungs if resolution in (None, key[0])]
        if not wanted:
            raise UserError(f"--resolution {resolution}: bucket_config has {', '.join(self.entries)}")
        if base is not None and base not in self.rungs:
            known = ", ".join(f"{name}:{frames}" for name, frames in self.rungs)
            raise UserError(f"--base {base[0]}:{base[1]} is no bucket that keeps samples: write one of {known}")
        print("| bucket | micro-batch | seconds | samples/s | peak GiB |\n|---|---|---|---|---|")
        reference = base_step_time
        if reference is None and base is not None:
            reference = self._find(base, None)
            if not reference:
                raise UserError(f"--base {base[0]}:{base[1]}: no size of {self._bounds(base)} has enough memory")
        for key in wanted:
            if base_step_time is not None or key != base:
                self._find(key, reference)

    def _find(self, key: tuple[str, int], reference: float | None) -> float:
        """Search one bucket; the seconds of what was found."""
        rung, (lower, upper) = self.rungs[key], self._bounds(key)
        if lower == upper and reference is not None:  # its size is given
            return 0.0
        self.found[key], seconds = search_between(lower, upper, lambda size: self._seconds(rung, size), reference)
        if not seconds:
            self.without.append(f"{rung}, {lower} to {upper}")
        return seconds

    def _bounds(self, key: tuple[str, int]) -> tuple[int, int]:
        guess, spread = guess_and_range(self.entries[key[0]][key[1]][1], self.spread)
        return max(guess - spread, 1), guess + spread

    def _seconds(self, rung: Rung, count: int) -> float | None:
        size = max(rung.shapes.sizes, key=lambda one: one[0] * one[1])
        measured = self.rehearsal.measure((rung.num_frames, *size), count)
        if measured is None:
            print(f"| {rung} | {count} | too much memory | | |", flush=True)
            return None
        seconds, peak = measured
        print(f"| {rung} | {count} | {seconds:.3f} | {count / seconds:.1f} | {peak / GIB:.2f} |", flush=True)
        return seconds
