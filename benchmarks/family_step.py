"""How fast an update of the families beside the Stable Cascade is, beside the library's network in the plain loop.

    python3 benchmarks/family_step.py                       # on a GPU the published sizes, else small networks
    python3 benchmarks/family_step.py --families latte      # one family of `benchmarks/plain_loops.py`
    python3 benchmarks/family_step.py --cases "SD small" --turns 5 --updates 10

Three contenders take turns in one process: the plain loop and the training script, both on the same features in
memory, and the script on pictures, which its frozen networks see in every update (but T5 of Cosmos-Predict2,
PixArt-alpha and Open-Sora, whose texts always come from a cache). The plain loop is that of the library's training
examples, and for DiT, Latte and STDiT3, which no library has, the published one around our network, of STDiT3 with its
attention written out (`benchmarks/plain_stdit.py`): `clip_grad_norm_`, `torch.optim.AdamW` as it is by default, and on
a GPU autocast to bfloat16. The networks have random weights, the same for both.
"""

import warpcore.openmp
import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.plain_loops import EXAMPLE_LR, FAMILIES, Case, Family
from families.common.features import stored, stored_name
from families.common.training import DiffusionTraining
from warpcore import optim
from warpcore.config import make_config
from warpcore.data.reader import Batch

PLAIN_LOOP, FROM_FEATURES, FROM_PICTURES = "the library, plain loop", "ours, from features", "ours, from pictures"


def cases(device: torch.device, family: Family) -> tuple[Case, ...]:
    return family.on_gpu if device.type == "cuda" else family.on_cpu


def training(family: Family, case: Case, device: torch.device, folder: Path) -> DiffusionTraining:
    """The training script with its networks."""
    kind = family.contender()
    torch.manual_seed(0)
    run = kind(make_config(kind.Config, family.write(case, folder, device) | {
        "experiment_id": "step", "checkpoint_path": str(folder), "webdataset_path": str(folder), "updates": 1,
        "device": device.type, "lr": EXAMPLE_LR, "optimizer": "adamw",
    } | case.keys | dict(family.undropped)))  # fmt: skip
    run.update = 0
    run.make_networks()
    return run


def with_features(run: DiffusionTraining, batch: Batch) -> Batch:
    """A batch as a cache gives it: features in place of pictures."""
    _, random = run.encoded(batch)
    with torch.no_grad():
        made = run.picture_features(batch, random)
        if any(name not in made and stored(batch, name) is None for name in run.features):
            made |= run.text_conditions(batch.captions)
    found = {stored_name(name): made[name] for name in run.features if name in made}
    return replace(batch, images=None, extra=batch.extra | found)


def our_update(run: DiffusionTraining, batch: Batch) -> Callable[[], None]:
    trained, never = list(run.parameters.values()), torch.zeros((), device=run.device)

    def update() -> None:
        run.forward(batch).loss.mean().backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        torch.nn.utils.clip_grads_with_norm_(trained, 1.0, norm)
        optim.step(run.optimizers, never)
        for parameter in trained:
            parameter.grad = None

    return update


def their_update(family: Family, run: DiffusionTraining, batch: Batch, folder: Path) -> Callable[[], None]:
    """The plain loop on the features of a batch."""
    network, loss_of = family.plain_loop(run, batch, folder)
    network.to(run.device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=EXAMPLE_LR)
    cast = torch.autocast("cuda", torch.bfloat16) if run.device.type == "cuda" else nullcontext()

    def update() -> None:
        with cast:
            loss = loss_of()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return update


def measure(family: Family, case: Case, device: torch.device, turns: int, updates: int) -> dict[str, float]:
    """Median seconds per update of each contender."""
    with tempfile.TemporaryDirectory(prefix="warpcore_family_step_") as scratch:
        folder = Path(scratch)
        run = training(family, case, device, folder)
        pictures = family.batch(run, case).to(device)
        features = with_features(run, pictures)
        contenders = {
            PLAIN_LOOP: their_update(family, run, features, folder),
            FROM_FEATURES: our_update(run, features),
            FROM_PICTURES: our_update(run, pictures),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(turns + 1):  # the first one warms up
            for name, update in contenders.items():
                for _ in range(updates if turn else 1):
                    began = _now(device)
                    update()
                    seconds[name] += [_now(device) - began] if turn else []
        run.close()
    return {name: statistics.median(took) for name, took in seconds.items()}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="by default all")
    parser.add_argument("--cases", default="", help="only cases whose names contain this text")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--updates", type=int, default=5, help="of each turn")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device}, torch {torch.__version__}, {torch.get_num_threads()} threads; medians of "
          f"{options.turns} turns of {options.updates} updates\n")  # fmt: skip
    print("| case | contender | ms per update | beside the plain loop |\n|---|---|---|---|")
    for family in map(FAMILIES.get, options.families):
        for case in cases(device, family):
            if options.cases in str(case):
                for name, seconds in (took := measure(family, case, device, options.turns, options.updates)).items():
                    gain = f"{took[PLAIN_LOOP] / seconds:.2f}x"
                    print(f"| {case} | {name} | {seconds * 1000:.1f} | {gain} |", flush=True)


if __name__ == "__main__":
    main()
