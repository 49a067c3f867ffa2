"""The life of a run: configuration, processes, data, networks, the loop, checkpoints, samples.

A script subclasses `WarpCore` and overrides a handful of hooks (`warpcore.use_case`); everything else is here and in
the modules beside.
"""

import json
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from warpcore import compute, evaluation, from_scratch, gradients, optim, post_hoc_ema, reports, resuming, validation
from warpcore.config import Config, dump_config, load_config
from warpcore.data.reader import Batch
from warpcore.errors import clear_errors
from warpcore.feed import Feed
from warpcore.files import write_whole
from warpcore.keys import changed_keys
from warpcore.launch import launch
from warpcore.lr_schedules import lr_at
from warpcore.metrics import Metrics
from warpcore.notes import NOTES, Notes
from warpcore.parameter_groups import what_is_trained
from warpcore.peers import explained, tell_once
from warpcore.planning import fitted
from warpcore.profiling import profiled
from warpcore.progress import Progress
from warpcore.random import stable_hash
from warpcore.results import Losses, Sampled
from warpcore.signals import STOPPED_EARLY, stop_signals
from warpcore.tracking import make_tracker
from warpcore.update_mean import UpdateMean
from warpcore.use_case import UseCase
from warpcore.votes import Vote

__all__ = ["Losses", "Sampled", "WarpCore"]


class WarpCore(UseCase):
    """Trains what a subclass describes. `MyUseCase.main()` in a script is all that is needed to run it.

    Hooks to override: `build`, `encode`, `loss`, and where wanted `begin`, `sample`, `update_state`, `weights`,
    `file_metadata`, `extra_fields`, `index_columns` and `computed_in_workers`.
    """

    def __init__(self, config: Config):
        super().__init__(config)
        self._profiling, self._profile = ExitStack(), None
        self.notes = Notes()
        self._stop_signal: int | None = None
        self._stop_vote = Vote(self.processes)

    @classmethod
    def main(cls) -> None:
        """Run from the command line: `SCRIPT config.yaml [key=value ...]`."""
        with clear_errors(tell_once):
            config = load_config(cls.Config)
            status = launch(config.processes, config.device)
            raise SystemExit(cls(config).run() if status is None else status)

    def run(self) -> int:
        """Train until the last update or a signal; returns the exit status, or raises SystemExit with it."""
        with stop_signals(self._request_stop), self._closing():
            self.setup()
            self._complete()
            batches, fault = self.feed.batches(), None
            self._start_profiling()
            self.feed.mark(self.update)
            while fault is None and self.update < self.config.updates and not self._stopping():
                self.make_update(batches)
                self.update += 1
                fault = self._after_update()
            self._end(fault or self._undo_unread())
            self.progress.end(self.update, self.next_commands())
        return STOPPED_EARLY if self.update < self.config.updates else 0

    def make_update(self, batches: Iterator[Batch]) -> None:
        """One optimizer step over `accumulation` micro-batches. It changes nothing where a number is not finite, or no
        sample could be read."""
        config, accumulation, update = self.config, self.feed.accumulation, self.update + 1
        losses, samples_hash, lr = [], 0, self._learning_rate(update)
        optim.set_lr(self.optimizers, lr)
        update_mean = UpdateMean(self.processes, accumulation, self.feed.plan.largest_micro_batch)
        for name in self.trainable:
            self.networks[name].train()
        for step in range(accumulation):
            batch = next(batches)
            if self.processes.counts_data:
                samples_hash += sum(stable_hash(key, seed) for key, seed in zip(batch.keys, batch.seeds, strict=True))
            # A network's own randomness (dropout) belongs to the micro-batch, not to the process or the moment.
            torch.manual_seed(stable_hash(config.seed, "network", batch.number))
            if self.processes.count > 1 and not config.fsdp_cpu_offload:  # what is offloaded has no room to wait
                trained = [self.networks[name] for name in self.trainable]
                gradients.synchronise(trained, self.processes, now=step == accumulation - 1)
            if config.compile == "graphs":
                compute.begin_graphs(self.parameters.values(), accumulated=step == 1)
            with self.autocast():
                result = self.loss(*self.encoded(batch))
            weight = update_mean.weight_of(batch)
            loss = self.loss_scale.scaled(result.loss.mean() * (weight / accumulation))
            if self.fused is None:
                loss.backward()
            elif batch.weight and self.feed.fault is None:
                self.fused.backward(loss, update_mean.correction())
            gradients.keep_largest(self.thinned, config.gradient_topk)
            losses.append(result.means(weight))
            self.statistics.add(result.statistics, batch.weight)

        self.loss_scale.unscale(self.parameters.values(), update_mean.correction())
        norm, norms = self.clipped_gradients() if self.fused is None else self.fused.finish()
        norms = {name: value.to(self.device) for name, value in ({"grad_norm": norm} | norms).items()}
        norm = norms["grad_norm"]
        mean = update_mean.of(losses)
        usable = torch.isfinite(norm) & torch.isfinite(mean["loss"]) & (self.feed.fault is None)
        finite, mean = update_mean.decided(usable, mean)
        if self.fused is None:
            optim.step(self.optimizers, ~finite)
        for parameter in self.parameters.values():
            parameter.grad = None
        self.statistics.apply(self.update_state, self.state.without_gradients, finite)
        self.state.step_averages(update, finite, config.ema_at_end and update == config.updates)
        norms |= self.loss_scale.metrics() | optim.metrics(self.optimizers) | update_mean.metrics
        self.loss_scale.update(norm, finite)
        times = {f"ms/{name}": value for name, value in batch.milliseconds.items()}
        self.metrics.add(update, samples_hash, **mean, **norms, **times, lr=lr, data_wait=self.feed.take_data_wait())

    def setup(self) -> None:
        """Everything before the first update: networks, optimizers, data, and the state of an earlier start."""
        self.checkpoints = resuming.checkpoints_of(self.config, self.processes)
        origin = self.origin = resuming.origin_of(self.config, self.checkpoints, self.processes)
        saved = origin.values if origin else {}

        self.config = fitted(self, origin, lambda: self._stop_signal is not None)
        self.make_networks(saved if origin else None)
        config = self.config
        self.feed = Feed(config, self.processes, saved.get("feed"), self.data_needs())
        self.config, of_epochs = config.in_updates(self.feed.rows_per_epoch, self.feed.samples_per_update)
        config = self.config
        if origin:
            self.state.load(origin.checkpoints, origin.update, saved, self.file_metadata())
            post_hoc_ema.check_beginning(self.state, origin, self.checkpoints, self.processes)
            self.loss_scale.load(saved.get("loss_scale", {}))
            self.update = origin.update
            self.kept = saved.get("kept", {}) | self.kept
        self.metrics = Metrics(config.run_folder / "metrics.jsonl", self.processes, config.batch_size)
        self.metrics.resume(self.update, saved.get("samples_seen"))
        in_a_row, in_parts = saved.get("nonfinite_updates", 0), config.fused_backward
        self.skipped = reports.SkippedUpdates(config.max_nonfinite_updates, in_a_row, in_parts)
        self.saved_update = self.update
        self.run_id = (origin and origin.is_own and saved.get("run_id")) or uuid.uuid4().hex[:12]
        tracked = self.processes.is_main
        self.tracker = make_tracker(
            wandb_project=config.wandb_project if tracked else None,
            wandb_entity=config.wandb_entity,
            tensorboard=config.tensorboard and tracked,
            folder=config.run_folder,
            run_id=self.run_id,
            config=config.model_dump(mode="json"),
            resume_update=origin and origin.update,
        )
        if tracked and self.update < config.updates:
            self.notes = Notes(config.run_folder / NOTES)
            self.notes.begin(self.update)
        self.progress = Progress(self.processes.is_main, config.updates, self.update, self.device, self.notes)
        self.progress.say(f"keys that are not at their defaults:\n{changed_keys(config)}\n{config.where_shown}")
        self.cannot_draw = self.processes.first_of(self.cannot_draw)  # a file may be missing on one machine alone
        if self.cannot_draw:
            self.progress.say(self.cannot_draw)
        self._say_what_is_trained(of_epochs)
        if origin:
            self.progress.say(origin.told(config.updates))
        if self.processes.is_main and self.update < config.updates:  # or else it tells how the weights were made
            write_whole(config.run_folder / "config.yaml", dump_config(config))

    def _say_what_is_trained(self, of_epochs: list[str]) -> None:
        """For how long, what starts from scratch, and how much is trained, where the config says something of them."""
        config, lines = self.config, from_scratch.what_starts(self.fresh_layers)
        if config.start_from_scratch and self.origin:
            before = "; ".join(self.kept.get(from_scratch.KEY, ())) or "nothing was set to new values"
            lines = [f"{from_scratch.KEY}: the run goes on with its own weights; at its start: {before}"]
        elif lines:
            self.kept[from_scratch.KEY] = lines
        if config.start_from_scratch or config.parameter_groups:
            lines = lines + what_is_trained({name: self.networks[name] for name in self.trainable})
        if config.optimizer == "muon" and self.muon_takes_tables:
            lines = [*lines, "optimizer: muon: this run goes on as it began, with tables among the matrices"]
        for line in [*of_epochs, *lines, *post_hoc_ema.disk_use(self.state, config)]:
            self.progress.say(line)

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
            fault = self._undo_unread()
            if fault is not None:
                return fault
            self._report(save)
        if evaluated:
            with self.metrics.not_training():
                if config.weight_norm:
                    self._tell(evaluation.weight_norms(self.parameters))
                self._validate()
                self._draw()
            self.checkpoints.bring_files()
        self.checkpoints.check()
        return None

    def _end(self, fault: Exception | None) -> None:
        """Save what is not saved yet, and raise `fault`."""
        if self.saved_update != self.update:  # asked to stop
            self.progress.say(f"saving update {self.update} before the run stops")
            self._report(save=True)
        self.checkpoints.wait()
        if fault is not None:
            raise fault
        self.feed.check_read()

    def _start_profiling(self) -> None:
        """Record a few updates, if the config asks for it, on the main process."""
        if self.config.profile and self.processes.is_main:
            folder = self.config.run_folder / "profile"
            self._profile = self._profiling.enter_context(profiled(folder, self.device))

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """Afterwards everything is let go of, whatever happened inside."""
        try:
            with explained():
                yield
        except BaseException as error:
            self.notes.fail(self.update, error)
            raise
        finally:
            self.close()

    def close(self) -> None:
        """Let go of everything; safe at any moment."""
        with ExitStack() as closing:
            closing.callback(self._profiling.close)
            closing.callback(super().close)
            for part in ("progress", "checkpoints", "tracker", "feed"):
                if hasattr(self, part):
                    closing.callback(getattr(self, part).close)

    # ------------------------------------------------------------------ pieces of an update

    def _learning_rate(self, update: int) -> float:
        config = self.config
        return lr_at(
            update, schedule=config.lr_schedule, lr=config.lr, warmup_updates=config.warmup_updates,
            updates=config.updates, min_lr_ratio=config.min_lr_ratio, num_cycles=config.num_cycles,
            power=config.lr_power, decay_updates=config.decay_updates, cycles=config.lr_cycles,
        )  # fmt: skip

    # ------------------------------------------------------------------ reports and saving

    def _report(self, save: bool) -> None:
        """Write the metrics, the only place where training waits for numbers from the device, and save if asked to.

        The save comes before all that can fail or take long: trackers, and the end of the run for what was counted.

        Raises:
            UserError: too many updates or samples in a row were unusable. That these were consumed is saved too.
        """
        lines = self.metrics.flush()
        alerts, too_many_updates = self.skipped.count(lines)
        notes, too_many_samples = self.feed.report()
        if save or too_many_samples:
            with self.metrics.not_training():
                self._save()
        reports.show(lines, alerts, notes, self.progress, self.tracker)
        for problem in (too_many_updates, too_many_samples):
            if problem:
                raise problem

    def _save(self) -> None:
        config, about, weights = self.config, self.file_metadata(), {}
        export = partial(self.checkpoints.export, metadata=about, update=self.update)
        if config.is_exported(self.update):
            both = evaluation.variants(self.state, averaged=bool(self.averages))
            weights = evaluation.exported_weights(both, self.weights, export)
        if config.is_snapshot(self.update):
            weights |= post_hoc_ema.snapshot(self.state, self.weights, export, self.update)
        tensors, values = self.state.save()
        values |= {
            "about": about,
            "kept": self.kept,
            "feed": self.feed.state(),
            "samples_seen": self.metrics.samples_seen,
            "nonfinite_updates": self.skipped.in_a_row,
            "loss_scale": self.loss_scale.state(),
            "run_id": self.run_id,
        }
        self.saved_update = self.update
        self.checkpoints.save(self.update, tensors, values, weights, about, config.is_backup(self.update))
        if self.processes.is_main:
            info = {"update": self.update, "updates": config.updates, "run_id": self.run_id,
                    "bad_samples": self.feed.bad_samples}  # fmt: skip
            write_whole(config.run_folder / "info.json", json.dumps(info, indent=1) + "\n")

    # ------------------------------------------------------------------ validation and samples

    def _variants(self) -> evaluation.Variants:
        """The weights, and their average once it differs from them."""
        averaged = bool(self.averages) and self.update > self.config.ema_start_iters
        return evaluation.variants(self.state, averaged)

    def _validate(self) -> None:
        """Report the mean loss and metrics over the validation samples, with the same noise each time."""
        means = validation.validation_means(
            self._variants(), self.feed.validation, self.validation_losses, self.config.seed, self.processes
        )
        self._tell(means)
        self._say_of_data()
        if means:
            self.progress.say(f"update {self.update}: {validation.told(means)}")

    def _tell(self, numbers: dict[str, float]) -> None:
        """Add numbers to the line of this update, in the metrics and the trackers."""
        self.metrics.extend(self.update, numbers)
        self.tracker.log(self.update, numbers)

    def _draw(self) -> None:
        """Draw sample pictures. Where memory is too short, a message says so, and the run goes on without them."""
        if self.cannot_draw or not self._has_samples():
            return
        rows, shortage = evaluation.draw(self._variants(), self.autocast, self.held_out, self.sample)
        # One process alone may be short of memory; all of them have to agree on whether they draw the next time.
        self.cannot_draw = self.processes.first_of(shortage)
        if self.cannot_draw:
            self.progress.say(self.cannot_draw)
            return
        self._say_of_data()
        if not rows or not self.processes.is_main:
            return
        smaller = evaluation.show(rows, self._samples_file(), self.update, self.tracker)
        self.progress.say(f"update {self.update}: samples in {self._samples_file()}{smaller}")

    def _complete(self) -> None:
        """Make what an earlier start, which ended after the save that this one goes on from, could not make."""
        if not self.update or not self.config.is_evaluated(self.update):
            return
        line = self.processes.on_main(self.metrics.last_line)  # the others may come before it has cut off a half line
        if self.feed.plan.has_validation and not any(name.startswith("validation_") for name in line):
            self._validate()
        if self._has_samples() and not self.cannot_draw and not self.processes.on_main(self._samples_are_there):
            self._draw()

    def _has_samples(self) -> bool:
        """Whether the use case has anything to show."""
        return type(self).sample is not UseCase.sample

    def held_out(self) -> Batch | None:
        """The samples that `sample` draws pictures for."""
        return self.feed.to_draw(self.data_to_draw()) if self.draws_samples else None

    def _samples_file(self) -> Path:
        return self.config.samples_folder / f"{self.update:08d}.png"

    def _samples_are_there(self) -> bool:
        path, config = self._samples_file(), self.config
        return path.exists() if config.output_path else self.checkpoints.has(str(path.relative_to(config.run_folder)))

    def _say_of_data(self) -> None:
        for note in self.feed.take_notes():
            self.progress.say(note)

    # ------------------------------------------------------------------ stopping

    def _undo_unread(self) -> Exception | None:
        """What any process could not read of its data, if so (collective): the error that the run has to end with.

        The updates made without that data, which have changed no weights, are taken back on all processes.
        """
        fault = self.feed.find_fault()
        if fault is None:
            return None
        self.update, error = fault
        self.feed.rewind(self.update)
        self.metrics.forget(self.update)
        return error

    def _request_stop(self, number: int) -> None:
        self._stop_signal = number

    def _stopping(self) -> bool:
        """Whether any process was asked to stop, or could not read its data; all of them agree."""
        return self._stop_vote.cast(self._stop_signal is not None or self.feed.fault is not None)
