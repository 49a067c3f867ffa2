"""What a run survives, beside what chaos.py and faults.py do to it: a list, and whether the tests that do it pass.

python3 benchmarks/survival.py
"""

import subprocess
import sys
from pathlib import Path

_TESTS = Path(__file__).parents[1] / "tests" / "warpcore"
SURVIVED = {
    "the disk is full (no file can grow)": ("test_core.py", "full_disk"),
    "the folder can't be written": ("test_checkpoint.py", "cannot_be_written"),
    "a checkpoint with a flipped byte, a cut or a missing file": ("test_checkpoint.py", "damaged"),
    "the same of a checkpoint on S3": ("test_s3_checkpoints.py", "damaged"),
    "killed while a checkpoint is written": ("test_checkpoint.py", "killed_while_it_saves"),
    "killed while a checkpoint is sent to S3": ("test_s3_checkpoints.py", "killed_while_it_sends"),
    "two runs with one experiment_id, in a folder": ("test_core.py", "two_runs"),
    "two runs with one experiment_id, on S3": ("test_lease.py", "two_runs"),
    "S3 is gone for a moment": ("test_lease.py", "renewed_again"),
    "an older checkpoint can't be removed, in a folder": ("test_checkpoint.py", "cannot_be_removed"),
    "the same on S3": ("test_s3_checkpoints.py", "can_not_be_removed_stays"),
    "the clock jumps between two starts": ("test_checkpoint.py", "clock"),
    "a process stops answering": ("test_processes.py", "stops_answering"),
    "a process falls silent while they meet": ("test_processes.py", "falls_silent"),
    "a worker of the loader is killed": ("data/test_loader.py", "killed_worker"),
    "a tar is swapped while it is in use": ("data/test_s3_training.py", "swapped"),
    "a tar is cut anywhere": ("data/test_index.py", "cut_tar"),
}
"""What happens -> test file, and a part of the names of the tests that let it happen."""


def survives(what: str) -> bool:
    file, name = SURVIVED[what]
    # 5: no such test. It must not count as survived, nor must one that was skipped.
    command = (sys.executable, "-m", "pytest", "-o", "addopts=", str(_TESTS / file), "-k", name)
    ended = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=_TESTS.parents[1])
    return ended.returncode == 0 and " passed" in ended.stdout and "skipped" not in ended.stdout


def main() -> None:
    print("| what happens | survived |\n|---|---|")
    for what in SURVIVED:
        print(f"| {what} | {'yes' if survives(what) else 'NO'} |", flush=True)


if __name__ == "__main__":
    main()
