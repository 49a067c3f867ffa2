"""Whether techniques cost quality: minis trained with each one and without, over several seeds, drawn with and scored.

    python3 benchmarks/quality.py sd c sd_lora c_lora [KEY=VALUE ...] [--seeds 3] [--only came LoKr] [--folder FOLDER]

Needs what `make quickstart quickstart_sd` makes: the demo sets, the cache, and the runs that LoRAs start from. Each
row is the mean over the seeds; in brackets is how far it is from the row `off`. KEY=VALUE go to every training,
such as `updates=800 validation_levels=8` for less than the quickstarts' time (with another --folder). What was
trained and scored is not done again, so a stopped comparison goes on with the same command.
"""

import warpcore.openmp
import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from benchmarks.learning import scored_by
from benchmarks.scorer import accuracy, sentences
from benchmarks.subject import fidelity, subject_prompts
from families.registry import family_of
from tools.arguments import local_path, positive
from tools.demo_scenes import SEEN_PAIRS
from warpcore.config import make_config
from warpcore.errors import UserError, run_script
from warpcore.files import read_bytes, write_whole
from warpcore.safe_json import parse_json

ROOT = Path(__file__).parents[1]
OFF = "off"
SENTENCES = 200
"""Drawn for each run: a score of 80% then has a standard error of 2.8 points."""
ROUNDS = 8
"""How often a LoRA draws each sentence about its subject."""
SCORES = "scores.json"
LOSS = "validation loss x 1000"
"""That of the weights themselves, after the last update: chance moves it less than it moves scores of drawings."""


@dataclass(frozen=True)
class Technique:
    """What it changes in a config."""

    changes: Sequence[str] = ()
    averaged: float | None = None
    """Scored is the average of this length (`sigma_rel`) that tools/average.py makes."""


@dataclass(frozen=True)
class Case:
    """A mini and the techniques that are compared on it."""

    script: str
    config: str
    techniques: Mapping[str, Technique]
    given: Sequence[str] = ()
    """Changes for all of them."""


CAME = ("optimizer=came", "lr=5.0e-4", "warmup_updates=100")
"""Its steps are longer than AdamW's at the same rate; with the minis' own rates it learns next to nothing."""
FULL = {
    "came": Technique(CAME),
    "bfloat16 weights": Technique(["weights_dtype=bfloat16"]),
    "came, bfloat16 weights": Technique([*CAME, "weights_dtype=bfloat16"]),
    "post-hoc EMA": Technique(["post_hoc_ema={every: 100, sigma_rel: [0.05, 0.1]}"], averaged=0.07),
    "fused backward": Technique(["fused_backward=true", "clip_grad_norm=null", "clip_tensor_norm=1.0"]),
}
LORA = {
    "LoKr": Technique(["adapter=lokr"]),
    "LoKr, twice the rate": Technique(["adapter=lokr", "lr=6.0e-3"]),
    "LoKr, four times the rate": Technique(["adapter=lokr", "lr=1.2e-2"]),
    "LoKr, whole matrices": Technique(["adapter=lokr", "factor=4", "full_matrix=true"]),
    "LoHa": Technique(["adapter=loha"]),
    "LoHa, a third of the rate": Technique(["adapter=loha", "lr=1.0e-3"]),
    "LoHa, twice the rate": Technique(["adapter=loha", "lr=6.0e-3"]),
    "T-LoRA": Technique(["min_rank=4"]),
    "int8 base": Technique(["frozen_weights=int8"]),
    "int8 base, rotated": Technique(["frozen_weights=int8_rotated"]),
    "float8 base": Technique(["frozen_weights=float8"]),
}
CASES = {
    "sd": Case("train_sd", "quickstart_sd", FULL, ["webdataset_path=demo/sd_cache"]),
    "c": Case("train_c", "quickstart_c", FULL),
    "sd_lora": Case("train_sd_lora", "quickstart_sd_lora", LORA),
    "c_lora": Case("train_c_lora", "quickstart_lora", LORA),
}


def run_command(*arguments: str | Path) -> None:
    """Run a command of the project; what it prints goes to stderr. Raises UserError where it fails."""
    if subprocess.run([sys.executable, *map(str, arguments)], stdout=sys.stderr, check=False).returncode:
        raise UserError(f"python3 {' '.join(map(str, arguments))} failed; its message stands above")


def scores_of(case: Case, name: str, seed: int, folder: Path, changes: Sequence[str]) -> dict[str, float]:
    """Of one run in percent, by what is asked for, and its LOSS: trained and drawn with where that was not done."""
    technique = case.techniques.get(name, Technique())
    run = folder / f"{case.config}_{name.replace(', ', '_').replace(' ', '_')}_{seed}"
    if (run / SCORES).exists():
        return parse_json(read_bytes(run / SCORES))
    own = [f"experiment_id={run.name}", f"checkpoint_path={folder}", f"seed={seed}"]
    config = ROOT / "configs" / "training" / f"{case.config}.yaml"
    run_command(ROOT / "train" / f"{case.script}.py", config, *case.given, *technique.changes, *changes, *own)
    drawn = run
    if technique.averaged is not None:
        drawn = run.with_name(f"{run.name}_averaged")
        if not drawn.exists():
            run_command(ROOT / "tools" / "average.py", run, drawn, f"sigma_rel={technique.averaged}")
    found = {key: round(100 * value, 2) for key, value in score(drawn).items()}
    last = parse_json(read_bytes(run / "metrics.jsonl").splitlines()[-1])
    if "validation_loss" in last:
        found[LOSS] = round(1000 * last["validation_loss"], 2)
    write_whole(run / SCORES, json.dumps(found))
    return found


def score(run: Path) -> dict[str, float]:
    """Shares of drawings that are right: of unseen sentences, with a LoRA of those about its subject, too."""
    kind = scored_by(family_of(run))
    settings = make_config(kind.Config, {"run": [run]})
    drawing = kind(settings, steps=20, guidance=4.0, sampler="ddim")
    drawing = drawing.with_lora() if settings.lora else drawing
    texts = [text for _, text in sentences(SENTENCES, SEEN_PAIRS, seed=0)]
    right = accuracy(drawing.draw(texts, 0)[drawing.best], texts)
    names = ("colour", "position", "shape")
    if not settings.lora:
        return {name: right[name] for name in names}
    prompts = [prompt for shown in (True, False) for prompt in subject_prompts(shown)] * ROUNDS
    found = fidelity(drawing.draw([text for text, *_ in prompts], 0)[drawing.best], prompts)
    return {name: found[name] for name in ("subject", "colour", "place")} | {
        "other sentences": mean(right[name] for name in names)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", metavar="CASE", help=f"{', '.join(CASES)}; then KEY=VALUE")
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--only", nargs="+", metavar="TECHNIQUE", help=", ".join([*FULL, *LORA]))
    parser.add_argument("--folder", type=local_path, default=Path("runs/quality"), help="where the runs go")
    given = parser.parse_args()
    changes = [word for word in given.cases if "=" in word]
    names = [word for word in given.cases if "=" not in word]
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"there is no case {unknown[0]}; there are {', '.join(CASES)}")
    if unknown := [name for name in given.only or [] if name not in FULL | LORA]:
        parser.error(f"there is no technique {unknown[0]!r}; there are {', '.join([*FULL, *LORA])}")
    for name in names:
        case = CASES[name]
        print_table(name, case, given, changes)


def print_table(name: str, case: Case, given: argparse.Namespace, changes: Sequence[str]) -> None:
    """Train and score a case, a row for each technique as soon as it is known."""
    off: dict[str, float] = {}
    for technique in (OFF, *(one for one in case.techniques if given.only is None or one in given.only)):
        runs = [scores_of(case, technique, seed, given.folder, changes) for seed in range(given.seeds)]
        means = {key: mean(run[key] for run in runs) for key in runs[0]}
        if technique == OFF:
            off = means
            print(f"| {name}, {given.seeds} seeds | {' | '.join(means)} |\n|---{'|---' * len(means)}|")
        cells = [
            f"{value:.1f}" if technique == OFF else f"{value:.1f} ({value - off[key]:+.1f})"
            for key, value in means.items()
        ]
        print(f"| {technique} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
