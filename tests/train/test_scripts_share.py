"""Training scripts share code instead of repeating it, and stay short enough to be read."""

from pathlib import Path

SCRIPTS = sorted((Path(__file__).parents[2] / "train").glob("train_*.py"))
RUN = 5


def code_lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]


def test_runs_of_equal_lines_in_two_scripts_are_rare():
    lines = {path: code_lines(path) for path in SCRIPTS}
    runs = {path: [tuple(own[i : i + RUN]) for i in range(len(own) - RUN + 1)] for path, own in lines.items()}
    repeated = 0
    for path, own in runs.items():
        elsewhere = {run for other in SCRIPTS if other != path for run in runs[other]}
        covered = {i + k for i, run in enumerate(own) if run in elsewhere for k in range(RUN)}
        repeated += len(covered)
    assert repeated < 0.05 * sum(len(own) for own in lines.values())


def test_every_script_can_be_read_at_once():
    assert {path.name: n for path in SCRIPTS if (n := len(path.read_text().splitlines())) > 150} == {}
