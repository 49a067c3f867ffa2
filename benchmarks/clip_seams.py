"""How well a mini that draws videos goes on from given frames, and clip after clip.

    python3 benchmarks/clip_seams.py runs/quickstart_video
    python3 benchmarks/clip_seams.py runs/quickstart_video 40 2 guidance=4

The arguments: a run, the number of videos, of latent frames that are given, and keys of inference/text_to_video.py.
Extended: the last frames of a true clip of a direction are given; the first new frame is compared with the true next
one. Looped: things that stay are drawn over 9 clips, with 8 seams.
"""

import warpcore.openmp
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from benchmarks.clip_scorer import look, middle_of
from benchmarks.scorer import in_lab, things
from families.common.family import TEXT_TO_VIDEO
from families.open_sora.autoencoder import autoencoder
from families.open_sora.scoring import ScoredOpenSoraSettings
from families.registry import load_task
from tools.demo_clips import DIRECTIONS, FPS, NUM_FRAMES, MovingScene, captioned_scene, render
from warpcore.clips import encode_mp4
from warpcore.config import make_config
from warpcore.errors import UserError, run_script
from warpcore.meta import only_shapes

LOOPS = 9
SEAM_PX = 2.0


@dataclass(frozen=True)
class RunClips:
    """The clips of a run, which are parts of those of the demo set."""

    frames: int
    latent_frames: int
    step: int
    """From one frame to the next, in frames of the demo set."""

    @classmethod
    def of(cls, run: str) -> Self:
        settings = make_config(ScoredOpenSoraSettings, {"run": [run]})
        with only_shapes():
            latent_frames = autoencoder(settings).latent_frames(settings.num_frames)
        return cls(settings.num_frames, latent_frames, round(FPS / settings.frame_rate))

    @property
    def fps(self) -> float:
        return FPS / self.step

    def frames_of(self, latent_frames: int) -> int:
        """The frames that the first latent ones of a clip are of. Raises UserError where none follows these."""
        if latent_frames >= self.latent_frames:
            given = f"{latent_frames} latent frames are given of {self.latent_frames}"
            raise UserError(f"{given}: nothing is left to draw; give fewer")
        return 1 + (latent_frames - 1) * ((self.frames - 1) // (self.latent_frames - 1))

    def true(self, scene: MovingScene, start: int) -> np.ndarray:
        """A clip of the demo set from a frame on, or from an earlier one where too few would be left: uint8
        (T, H, W, 3)."""
        start = min(start, NUM_FRAMES - 1 - (self.frames - 1) * self.step)
        return render(scene)[start :: self.step][: self.frames]


def place(frame: np.ndarray) -> np.ndarray | None:
    """(x, y) in px of the middle of the largest thing in a frame, uint8 (H, W, 3); None where nothing stands out."""
    masks = things(in_lab(frame))
    if not masks:
        return None
    height, width = frame.shape[:2]
    return np.array(middle_of(max(masks, key=np.count_nonzero))) * (width, height)


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """In px, of what two frames show; infinite where one shows nothing."""
    places = place(first), place(second)
    return float("inf") if any(one is None for one in places) else float(np.hypot(*(places[0] - places[1])))


def colour(frame: np.ndarray) -> np.ndarray | None:
    """The mean CIELAB colour of the largest thing in a frame; None where nothing stands out."""
    lab = in_lab(frame)
    masks = things(lab)
    return lab[max(masks, key=np.count_nonzero)].mean(axis=0) if masks else None


def drift(clips: Sequence[np.ndarray]) -> float:
    """How far the colour of the thing in the last of some clips is from that in the first, in CIELAB."""
    first, last = ([one for one in map(colour, clip) if one is not None] for clip in (clips[0], clips[-1]))
    return float(np.linalg.norm(np.mean(first, axis=0) - np.mean(last, axis=0))) if first and last else float("inf")


def psnr(made: np.ndarray, true: np.ndarray) -> float:
    """In dB, of uint8 frames of one size."""
    return float(10 * np.log10(255**2 / max(np.square(made.astype(float) - true).mean(), 1e-9)))


def scenes(number: int, motions: Sequence[str], seed: int) -> list[tuple[MovingScene, str]]:
    """Scenes of some motions, with sentences that the demo set never uses."""
    rng, found = np.random.default_rng(seed), []
    while len(found) < number:
        scene, text = captioned_scene(rng, held_out=True)
        if scene.motion in motions:
            found.append((scene, text))
    return found


def videos_of(run: str, prompts: Sequence[str], keys: Sequence[str]) -> list[np.ndarray]:
    """A video, uint8 (T, H, W, 3), for each prompt, each from noise of its own."""
    kind, config = load_task(TEXT_TO_VIDEO, [f"run={run}", f"prompts={json.dumps([*prompts])}", *keys])
    task, found = kind(config), {}
    task.draw(range(len(prompts)), range(len(prompts)), found.__setitem__)
    return [found[number] for number in range(len(prompts))]


def extended(run: str, number: int, given: int, keys: Sequence[str]) -> None:
    """Print how clips of directions go on from the end of true ones."""
    clips, cases = RunClips.of(run), scenes(number, [*DIRECTIONS], seed=1)
    known = clips.frames_of(given)
    true = [clips.true(scene, max(0, 8 - known)) for scene, _ in cases]
    with tempfile.TemporaryDirectory() as folder:
        prompts = []
        for i, (clip, (_, text)) in enumerate(zip(true, cases, strict=True)):
            path = Path(folder, f"{i}.mp4")
            path.write_bytes(encode_mp4(clip[:known], clips.fps, crf=0))
            where = {"reference_path": str(path), "mask_strategy": f"0,0,0,0,{given}"}
            prompts.append(text + json.dumps(where))
        drawn = videos_of(run, prompts, keys)
    seams = [distance(clip[known], one[known]) for clip, one in zip(drawn, true, strict=True)]
    kept = [look(clip[known - 1 :]).motion == scene.motion for clip, (scene, _) in zip(drawn, cases, strict=True)]
    quality = [psnr(clip[:known], one[:known]) for clip, one in zip(drawn, true, strict=True)]
    print(f"extended from {known} frames: the first new frame within {SEAM_PX:g} px of the true next one in "
          f"{100 * np.mean(np.array(seams) <= SEAM_PX):.0f}% (median {np.median(seams):.1f} px), direction kept in "
          f"{100 * np.mean(kept):.0f}%; given frames {np.mean(quality):.1f} dB")  # fmt: skip


def looped(run: str, number: int, given: int, keys: Sequence[str]) -> None:
    """Print how far colours drift, and things jump, along videos of things that stay."""
    clips, cases = RunClips.of(run), scenes(number, ["stay"], seed=2)
    chosen = [f"loop={LOOPS}", f"condition_frame_length={given}", *keys]
    drawn = videos_of(run, [text for _, text in cases], chosen)
    new = clips.frames - clips.frames_of(given)
    starts = [clips.frames + i * new for i in range(LOOPS - 1)]
    jumps = [distance(video[start - 1], video[start]) for video in drawn for start in starts]
    drifts = [drift([video[: clips.frames], video[-new:]]) for video in drawn]
    print(f"looped {LOOPS - 1} times: within {SEAM_PX:g} px over {100 * np.mean(np.array(jumps) <= SEAM_PX):.0f}% of "
          f"the seams; colour drifts by {np.median(drifts):.1f} in CIELAB (largest {max(drifts):.1f})")  # fmt: skip


def read_arguments(arguments: Sequence[str]) -> tuple[str, int, int, list[str]]:
    """The run, the number of videos, of latent frames that are given, and keys of a drawing."""
    plain, keys = ([one for one in arguments if ("=" in one) == is_key] for is_key in (False, True))
    if not 1 <= len(plain) <= 3 or not all(one.isdecimal() and int(one) for one in plain[1:]):
        raise UserError("give a run, then if wanted the number of videos and of latent frames that are given")
    number, given = [*map(int, plain[1:]), *(20, 2)[len(plain) - 1 :]]
    return plain[0], number, given, ["batch_size=10", *keys]


def main() -> None:
    arguments = read_arguments(sys.argv[1:])
    extended(*arguments)
    looped(*arguments)


if __name__ == "__main__":
    run_script(main)
