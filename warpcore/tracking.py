"""What a run tells wandb and TensorBoard, behind one small interface.

The engine writes metrics.jsonl itself; trackers show the same figures to people. Only rank 0 has one.
"""

import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from warpcore.clips import encode_gif, encode_mp4
from warpcore.redaction import redact
from warpcore.safe_json import parse_json

logger = logging.getLogger(__name__)

INIT_TIMEOUT_SECONDS = 30


class Tracker:
    """Tracks nothing: the interface, and what processes other than rank 0 hold."""

    def log(self, update: int, scalars: Mapping[str, float]) -> None:
        """Figures after an update. Updates come in increasing order."""

    def images(self, update: int, name: str, picture: np.ndarray, caption: str = "") -> None:
        """A picture, uint8 (H, W, 3)."""

    def clip(self, update: int, name: str, clip: np.ndarray, fps: float, caption: str = "") -> None:
        """A clip, uint8 (T, H, W, 3)."""

    def alert(self, title: str, text: str) -> None:
        """Something a person should look at, such as non-finite gradients."""

    def close(self) -> None:
        """Writes what is pending. Nothing may be tracked afterwards."""


class TensorBoard(Tracker):
    """Events in `folder`; view them with `tensorboard --logdir folder`."""

    def __init__(self, folder: Path, config: Mapping, resume_update: int | None):
        from torch.utils.tensorboard import SummaryWriter

        # Readers drop what an interrupted run had written beyond the checkpoint that it goes on from.
        purge_step = None if resume_update is None else resume_update + 1
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        self._update = resume_update or 0
        # Four spaces make a code block of Markdown.
        text = json.dumps(dict(config), indent=2, default=str)
        self._writer.add_text("config", "\n".join(f"    {line}" for line in text.splitlines()), self._update)

    def log(self, update, scalars):
        self._update = update
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, update)

    def images(self, update, name, picture, caption=""):
        self._writer.add_image(name, picture, update, dataformats="HWC")
        if caption:
            self._writer.add_text(f"{name}/caption", caption, update)

    def clip(self, update, name, clip, fps, caption=""):
        from tensorboard.compat.proto.summary_pb2 import Summary

        # TensorBoard shows an animated GIF as an image that moves.
        image = Summary.Image(height=clip.shape[1], width=clip.shape[2], colorspace=3)
        image.encoded_image_string = encode_gif(clip, fps)
        self._writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), update)
        if caption:
            self._writer.add_text(f"{name}/caption", caption, update)

    def alert(self, title, text):
        self._writer.add_text("alerts", f"**{title}** {text}", self._update)
        self._writer.flush()

    def close(self):
        self._writer.close()


class Wandb(Tracker):
    """A wandb run whose steps are updates.

    A resumed run goes on under its id. wandb takes no step twice, so updates that an interrupted run had logged beyond
    its checkpoint are left out the second time. Without network or login the run goes on offline and says so;
    WANDB_MODE=offline chooses that from the start.
    """

    def __init__(self, project: str, entity: str | None, folder: Path, run_id: str, config: Mapping, name: str):
        import wandb

        self._wandb = wandb
        folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(init_timeout=INIT_TIMEOUT_SECONDS, login_timeout=INIT_TIMEOUT_SECONDS)
        what = {"project": project, "entity": entity, "dir": str(folder), "id": run_id, "name": name}
        what |= {"config": dict(config), "allow_val_change": True, "resume": "allow", "settings": settings}
        try:
            self._run = wandb.init(**what)
        except wandb.Error as error:
            wandb.teardown()  # its service still holds the run's id
            self._run = wandb.init(**what, mode="offline")
            logger.warning(
                "wandb can't be reached (%s). The run goes on offline; upload it later with `wandb sync %s`",
                error,
                Path(self._run.dir).parent,
            )
        self._first = self._run.step

    def log(self, update, scalars):
        self._send(update, dict(scalars))

    def images(self, update, name, picture, caption=""):
        self._send(update, {name: self._wandb.Image(picture, caption=caption or None)})

    def clip(self, update, name, clip, fps, caption=""):
        video = self._wandb.Video(io.BytesIO(encode_mp4(clip, fps)), caption=caption or None, format="mp4")
        self._send(update, {name: video})

    def alert(self, title, text):
        self._run.alert(title, text)

    def close(self):
        self._run.finish()

    def _send(self, update: int, values: dict) -> None:
        if update >= self._first:
            self._run.log(values, step=update)


class Trackers(Tracker):
    """Several trackers as one. One that fails is reported and dropped: tracking never ends a run."""

    def __init__(self, trackers: list[Tracker]):
        self._trackers = list(trackers)

    def log(self, update, scalars):
        self._each("log", update, scalars)

    def images(self, update, name, picture, caption=""):
        self._each("images", update, name, picture, caption)

    def clip(self, update, name, clip, fps, caption=""):
        self._each("clip", update, name, clip, fps, caption)

    def alert(self, title, text):
        self._each("alert", title, redact(text))

    def close(self):
        self._each("close")

    def _each(self, method: str, *values) -> None:
        for tracker in list(self._trackers):
            try:
                getattr(tracker, method)(*values)
            except Exception as error:
                logger.error("%s failed (%r); the run goes on without it", type(tracker).__name__, error)
                self._trackers.remove(tracker)


def make_tracker(
    *,
    wandb_project: str | None,
    wandb_entity: str | None,
    tensorboard: bool,
    folder: Path | str,
    run_id: str,
    config: Mapping,
    resume_update: int | None = None,
    name: str | None = None,
) -> Tracker:
    """The trackers that the config asks for: wandb when `wandb_project` is set, TensorBoard when `tensorboard` is.

    Args:
        folder: the experiment's; files go to its `wandb` and `tensorboard`.
        run_id: wandb's id of the run, kept by the engine over restarts.
        config: JSON-able, shown beside the figures.
        resume_update: the update whose checkpoint the run goes on from; None for a fresh run.
        name: shown by wandb; default: the folder's name.
    """
    folder, config = Path(folder), parse_json(redact(json.dumps(dict(config))))
    trackers: list[Tracker] = []
    if wandb_project:
        trackers.append(Wandb(wandb_project, wandb_entity, folder, run_id, config, name or folder.resolve().name))
    if tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard", config, resume_update))
    return Trackers(trackers)
