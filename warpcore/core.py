"""The life of a run: configuration, processes, data, networks, the loop, checkpoints, samples.

A use case subclasses `WarpCore` and overrides a handful of hooks; everything else is here and in the modules beside.
"""

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from warpcore import compute, evaluation, optim, placement, reports
from warpcore.checkpoint import Checkpoints
from warpcore.config import Config, dump_config, load_config
from warpcore.data.reader import Batch
from warpcore.errors import clear_errors
from warpcore.feed import Feed
from warpcore.files import write_whole
from warpcore.keys import changed_keys
from warpcore.launch import launch
from warpcore.metrics import Metrics
from warpcore.networks import check_networks
from warpcore.offload import OnDemand
from warpcore.parameter_groups import freeze, optimizer_groups
from warpcore.processes import Vote, choose_dtype, explain, start_processes, stop_processes
from warpcore.profiling import profiled
from warpcore.progress import Progress
from warpcore.random import SampleRandom, stable_hash
from warpcore.results import Losses, Sampled
from warpcore.signals import STOPPED_EARLY, stop_signals
from warpcore.state import RunState
from warpcore.statistics import UpdateStatistics
from warpcore.tracking import make_tracker


class WarpCore:
    """Trains what a subclass describes. `MyUseCase.main()` in a script is all that is needed to run it.

    Hooks to override: `build`, `encode`, `loss`, and where wanted `begin`, `sample`, `update_state`, `weights`,
    `file_metadata`, `extra_fields`, `index_columns` and `computed_in_workers`.
    """

    Config: ClassVar[type[Config]] = Config
    trainable: ClassVar[dict[str, dict]] = {"generator": {}}
    """Names of the networks to train, each with settings of its optimizer group (`lr_scale`). Parameters of them that
    `build` freezes are neither trained, averaged nor kept in checkpoints, which makes adapters cheap."""
    needs_images: ClassVar[bool] = True
    """Whether the loader reads pictures."""
    needs_captions: ClassVar[bool] = True
    """Whether every sample needs a caption; without them `Batch.captions` are empty."""
    needs_geometry: ClassVar[bool] = False
    """Whether `Batch.geometry` is wanted: true size, size before the crop, and place of the crop of every picture."""
    cannot_draw: str | None = None
    """Why no sample pictures are drawn, which is told once; set by `build` where a network for them is missing."""
    draws_samples: bool = True
    """Whether `sample` is given samples to draw pictures for, of validation or else of the training data."""
    bucket_factor: int = 1
    """Sides of training pictures are multiples of this many pixels."""
    resumed: int | None = None
    """Update of the checkpoint that this start goes on from, known when `build` is called."""

    # ------------------------------------------------------------------ hooks

    def build(self) -> dict[str, nn.Module]:
        """All networks by name, with their weights loaded. Those in `trainable` are trained, the others frozen."""
        raise NotImplementedError

    def begin(self, saved: Mapping[str, Any] | None) -> None:
        """Settle what a run keeps from its first update on, before its networks are built; may replace `config`.

        saved: values of the checkpoint that is resumed: `about` (its `file_metadata`) and `kept` (its `self.kept`).
        None in a new run.
        """

    def encode(self, batch: Batch, random: SampleRandom) -> Any:
        """Turn a batch into what `loss` needs, without gradients."""
        return batch

    def loss(self, inputs: Any, random: SampleRandom) -> Losses:
        """The loss of each sample of a micro-batch."""
        raise NotImplementedError

    def sample(self, held_out: Batch | None) -> list[Sampled]:
        """Pictures to look at, the same ones each time. `held_out` are validation samples or, without any, a few of
        the training data; None where `draws_samples` is false."""
        return []

    def data_to_draw(self) -> Any:
        """Where those of the training data come from, written like `webdataset_path`."""
        return self.config.webdataset_path

    def update_state(self, statistics: dict[str, Tensor]) -> None:
        """Change state that is not a gradient, given the statistics of all samples of an update in global order."""

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """State dicts to export as weights files, by file name."""
        return {name: self.networks[name].state_dict() for name in self.trainable}

    def file_metadata(self) -> dict[str, str]:
        """What those files should say about themselves, beside their update."""
        return {}

    def extra_fields(self) -> dict:
        """Further members of each sample to read: name -> `warpcore.data.reader` field."""
        return {}

    def index_columns(self) -> list[str]:
        """Columns of the index for `Batch.columns`; every sample has to have them."""
        return self.config.columns

    def computed_in_workers(self) -> dict:
        """What the loader's workers compute of each batch, for `Batch.extra`: name -> picklable function of it."""
        return {}

    # ------------------------------------------------------------------ the run

    def __init__(self, config: Config):
        self.config = config
        self.processes = start_processes(
            config.device, config.use_fsdp, config.fsdp_shards, config.process_timeout_seconds, config.fsdp_cpu_offload
        )
        self.device = self.processes.device
        compute.check_graphs(config, self.device, sharded=self.processes.mesh is not None)
        of_weights = "bfloat16" if config.weights_dtype == "bfloat16" else None
        self.dtype = choose_dtype(config.dtype or of_weights, self.device)
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.allow_tf32
        self.bookkeeping: dict[str, Any] = {}  # further things with a state_dict of tensors
        self.kept: dict[str, Any] = {}  # JSON values that a run keeps when it is resumed, see `begin`
        self._profiling, self._profile = ExitStack(), None
        self._stop_signal: int | None = None
        self._stop_vote = Vote(self.processes)

    @classmethod
    def main(cls) -> None:
        """Run from the command line: `SCRIPT config.yaml [key=value ...]`."""
        with clear_errors():
            config = load_config(cls.Config)
            status = launch(config.processes, config.device)
            raise SystemExit(cls(config).run() if status is None else status)

    def run(self) -> int:
        """Train until the last update or a signal; returns the exit status."""
        with stop_signals(self._request_stop), self._closing():
            self.setup()
            evaluation.complete(self)
            batches, fault = self.feed.batches(), None
            self._start_profiling()
            self.feed.mark(self.update)
            while fault is None and self.update < self.config.updates and not self._stopping():
                self.make_update(batches)
                self.update += 1
                fault = self._after_update()
            self._end(fault or reports.undo_unread(self))
        return STOPPED_EARLY if self.update < self.config.updates else 0

    def make_update(self, batches: Iterator[Batch]) -> None:
        """One optimizer step over `accumulation` micro-batches; where a number is not finite, it changes nothing."""
        config, accumulation, update = self.config, self.feed.accumulation, self.update + 1
        losses, samples_hash = [], 0
        for name in self.trainable:
            self.networks[name].train()
        for step in range(accumulation):
            batch = next(batches)
            samples_hash += sum(stable_hash(key, seed) for key, seed in zip(batch.keys, batch.seeds, strict=True))
            # A network's own randomness (dropout) belongs to the micro-batch, not to the process or the moment.
            torch.manual_seed(stable_hash(config.seed, "network", batch.number))
            self._synchronise_gradients(step == accumulation - 1)
            if config.compile == "graphs":
                compute.begin_graphs(self.parameters.values(), accumulated=step == 1)
            with self.autocast():
                result = self.loss(*self.encoded(batch))
            (result.loss.mean() * (batch.weight / accumulation)).backward()
            losses.append(_means(result, batch.weight))
            self.statistics.add(result.statistics, batch.weight)

        norm = optim.clip_gradients(self.parameters.values(), config.clip_grad_norm).to(self.device)
        norms = {f"grad_norm/{name}": value for name, value in optim.gradient_norms(self.gradient_groups).items()}
        mean = {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}
        usable = torch.isfinite(norm) & torch.isfinite(mean["loss"]) & (self.feed.fault is None)
        finite = self.processes.all_true(usable)
        lr = self._learning_rate(update)
        optim.set_lr(self.optimizers, lr)
        optim.step(self.optimizers, ~finite)
        for parameter in self.parameters.values():
            parameter.grad = None
        self.statistics.apply(self.update_state, self.state.without_gradients, finite)
        for average in self.averages.values():
            average.step(update, finite)
        norms = {"grad_norm": norm} | {name: value.to(self.device) for name, value in norms.items()}
        times = {f"ms/{name}": value for name, value in batch.milliseconds.items()}
        self.metrics.add(update, samples_hash, **mean, **norms, **times, lr=lr, data_wait=self.feed.take_data_wait())

    def setup(self) -> None:
        """Everything before the first update: networks, optimizers, data, and the state of an earlier start."""
        config = self.config
        self.update = 0
        export_dtype = getattr(torch, config.export_dtype) if config.export_dtype else None
        self.checkpoints = Checkpoints(
            config.run_folder, self.processes, config.keep_last, config.run_url, export_dtype
        )
        resumed = self.resumed = self.checkpoints.newest()
        saved = self.checkpoints.values(resumed) if resumed is not None else {}

        self.make_networks(saved if resumed is not None else None)
        config = self.config
        self.state = RunState(self)
        self.feed = Feed(
            config, self.processes, saved.get("feed"), self.bucket_factor, self.needs_images, self.needs_captions,
            self.extra_fields(), self.computed_in_workers(), self.index_columns(), self.needs_geometry,
        )  # fmt: skip
        if resumed is not None:
            self.state.load(resumed, saved)
            self.update = resumed
        self.metrics = Metrics(config.run_folder / "metrics.jsonl", self.processes, config.batch_size)
        self.metrics.resume(self.update)
        self.nonfinite_updates = saved.get("nonfinite_updates", 0)  # in a row, up to the last report
        self.saved_update = self.update
        self.run_id = saved.get("run_id") or uuid.uuid4().hex[:12]
        tracked = self.processes.is_main
        self.tracker = make_tracker(
            wandb_project=config.wandb_project if tracked else None,
            wandb_entity=config.wandb_entity,
            tensorboard=config.tensorboard and tracked,
            folder=config.run_folder,
            run_id=self.run_id,
            config=config.model_dump(mode="json"),
            resume_update=resumed,
        )
        self.progress = Progress(self.processes.is_main, config.updates, self.update, self.device)
        self.progress.say(f"keys that are not at their defaults:\n{changed_keys(config)}")
        self.cannot_draw = self.processes.first_of(self.cannot_draw)  # a file may be missing on one machine alone
        if self.cannot_draw:
            self.progress.say(self.cannot_draw)
        if resumed is not None:
            self.progress.say(f"{config.run_place} is at update {resumed}" + (
                "" if resumed < config.updates else
                f": updates: {config.updates} leaves nothing to do; write a larger number to train on"
            ))  # fmt: skip
        if self.processes.is_main and self.update < config.updates:  # or else it tells how the weights were made
            write_whole(config.run_folder / "config.yaml", dump_config(config))

    def make_networks(self, saved: Mapping[str, Any] | None = None) -> None:
        """Networks, optimizers and averages, as they are before the first update; `saved` as in `begin`."""
        self.begin(saved)
        config = self.config
        torch.manual_seed(config.seed)
        self.networks = self.build()
        freeze({name: self.networks[name] for name in self.trainable}, config.parameter_groups)
        check_networks(self.networks, self.trainable, config)
        self.statistics = UpdateStatistics(self.processes, {name: self.networks[name] for name in self.trainable})
        self.on_demand: dict[str, OnDemand] = {}
        for name in self.networks:
            placement.place(self, name)
        parameters = {f"{name}.{p}": t for name in self.trainable for p, t in self.networks[name].named_parameters()}
        self.parameters = {name: tensor for name, tensor in parameters.items() if tensor.requires_grad}
        self.gradient_groups = optim.gradient_groups(self.parameters.items(), config.grad_norm_groups)
        self.optimizers = optim.build_optimizers(
            config.optimizer, optimizer_groups(self.trainable, self.parameters, config.parameter_groups),
            lr=config.lr, weight_decay=config.weight_decay, betas=config.betas, eps=config.eps,
        )  # fmt: skip
        optim.train_mode(self.optimizers)
        self.averages = placement.averages(self)

    def _after_update(self) -> Exception | None:
        """What follows an update: reports, and a save before all that can fail (validation, drawing, trackers).

        Returns the error that the run has to end with, where its data could not be read.
        """
        config, save = self.config, self.config.is_saved(self.update)
        if self._profile is not None:
            self._profile.step()
        self.feed.mark(self.update)
        evaluated = config.is_evaluated(self.update)
        if save or self.update % config.log_every == 0:
            fault = reports.undo_unread(self)
            if fault is not None:
                return fault
            reports.report(self, save)
        if evaluated:
            evaluation.evaluate(self)
        self.checkpoints.check()
        return None

    def _end(self, fault: Exception | None) -> None:
        """Save what is not saved yet, and raise `fault`."""
        if self.saved_update != self.update:  # asked to stop
            self.progress.say(f"saving update {self.update} before the run stops")
            reports.report(self, save=True)
        self.checkpoints.wait()
        if fault is not None:
            raise fault

    def _start_profiling(self) -> None:
        """Record a few updates, if the config asks for it, on the main process."""
        if self.config.profile and self.processes.is_main:
            folder = self.config.run_folder / "profile"
            self._profile = self._profiling.enter_context(profiled(folder, self.device))

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Afterwards everything is let go of, whatever happened inside."""
        try:
            yield
        except RuntimeError as error:
            explain(error)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Let go of everything; safe at any moment."""
        with ExitStack() as closing:
            closing.callback(self._profiling.close)
            closing.callback(stop_processes)
            closing.callback(self._drop_networks)
            for part in ("progress", "checkpoints", "tracker", "feed"):
                if hasattr(self, part):
                    closing.callback(getattr(self, part).close)

    def _drop_networks(self) -> None:
        self.networks = self.optimizers = self.averages = self.parameters = self.state = self.on_demand = None

    # ------------------------------------------------------------------ pieces of an update

    def autocast(self) -> AbstractContextManager:
        """Computes in the configured dtype."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else nullcontext()

    def encoded(self, batch: Batch) -> tuple[Any, SampleRandom]:
        """What `loss` takes of a batch, with the random numbers of its samples. To be called inside `autocast`."""
        random = SampleRandom(batch.seeds, self.device)
        with torch.no_grad():
            return self.encode(batch, random), random

    def forward(self, batch: Batch) -> Losses:
        """The losses of a batch, as in an update."""
        with self.autocast():
            return self.loss(*self.encoded(batch))

    def _learning_rate(self, update: int) -> float:
        config = self.config
        return optim.lr_at(
            update, schedule=config.lr_schedule, lr=config.lr, warmup_updates=config.warmup_updates,
            updates=config.updates, min_lr_ratio=config.min_lr_ratio,
        )  # fmt: skip

    def _synchronise_gradients(self, now: bool) -> None:
        # Of sharded networks, shards of gradients are added up in every micro-batch, or each process would keep whole
        # ones; over replicas, that waits for the last. What is offloaded has no room to wait on the device.
        if self.processes.count > 1 and not self.config.fsdp_cpu_offload:
            for name in self.trainable:
                network, sharded = self.networks[name], self.processes.mesh.size(1) > 1
                (network.set_requires_all_reduce if sharded else network.set_requires_gradient_sync)(now)

    # ------------------------------------------------------------------ saving

    def _save(self) -> None:
        config = self.config
        weights = evaluation.weights_to_publish(self) if config.is_exported(self.update) else {}
        tensors, values = self.state.save()
        about = self.file_metadata()
        values |= {
            "about": about,
            "kept": self.kept,
            "feed": self.feed.state(),
            "nonfinite_updates": self.nonfinite_updates,
            "run_id": self.run_id,
        }
        self.saved_update = self.update
        self.checkpoints.save(self.update, tensors, values, weights, about, config.is_backup(self.update))
        if self.processes.is_main:
            info = {"update": self.update, "updates": config.updates, "run_id": self.run_id,
                    "bad_samples": self.feed.bad_samples}  # fmt: skip
            write_whole(config.run_folder / "info.json", json.dumps(info, indent=1) + "\n")

    # ------------------------------------------------------------------ stopping

    def _request_stop(self, number: int) -> None:
        self._stop_signal = number

    def _stopping(self) -> bool:
        """Whether any process was asked to stop, or could not read its data; all of them agree."""
        return self._stop_vote.cast(self._stop_signal is not None or self.feed.fault is not None)


def _means(result: Losses, weight: float) -> dict[str, Tensor]:
    values = {"loss": result.loss, "raw_loss": result.raw, **result.metrics}
    return {name: value.detach().float().mean() * weight for name, value in values.items()}
