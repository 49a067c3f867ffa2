"""What the scripts of `inference/` draw with published folders is what the reference draws, for its random numbers."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from families.common.family import TEXT_TO_IMAGE, TEXT_TO_VIDEO
from families.nova import drawing, generation, sampling
from families.nova.drawing import NovaNetworks
from families.nova.versions import VERSIONS
from families.registry import load_task
from modules.nova_decoder import patchify
from tests.clips import write_clips
from tests.families.nova.test_files import published
from tests.golden import load_case, resolve
from tests.small_nova import load_nova
from tests.warpcore.runs import tiny_settings
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError

CASES = {"sample_t2i": ("mini", "transformer_t2i_small"), "sample_t2v": ("mini-video", "transformer_t2v_small")}
DRAWINGS = [(case, name) for case in CASES for name in load_nova(case)[0]]
KEYS = {
    "guidance_scale": "guidance", "min_guidance_scale": "min_guidance", "guidance_trunc": "guidance_trunc",
    "guidance_renorm": "guidance_renorm", "image_guidance_scale": "image_guidance", "num_diffusion_steps": "steps",
}  # fmt: skip
SIZE = [64, 96]


class RecordedDraws:
    """Those of one sample of the reference, in its order."""

    def __init__(self, draws: dict, sample: int):
        self.recorded = draws["order_uniform"][sample, None, :, 0]
        self.noises, self.step_noises = (
            iter([one[sample, None] for one in draws.get(kind, [])]) for kind in ("noise", "step_noise")
        )

    def order(self, tokens: int) -> Tensor:
        return self.recorded

    def noise(self, frame: int, group: int, shape: tuple[int, int]) -> Tensor:
        return patchify(next(self.noises), 2)

    def step_noise(self, frame: int, group: int, step: int, shape: tuple[int, int]) -> Tensor:
        return patchify(next(self.step_noises), 2)


class Recorder(nn.Module):
    """In place of the autoencoder: keeps what it is to decode, and gives the latents of a first frame."""

    def __init__(self, first: Tensor | None):
        super().__init__()
        self.first, self.decoded = first, []

    @property
    def scale(self):
        return self

    def latent_frames(self, frames: int) -> int:
        return 1 + (frames - 1) // 4

    def clip_moments(self, clips: Tensor) -> Tensor:
        assert clips.shape == (1, 1, 3, *SIZE)
        assert clips.dtype == torch.uint8
        return clips

    def latents(self, moments: Tensor, random: None) -> Tensor:
        return self.first[:, :, None]

    def decoded_clips(self, latents: Tensor) -> Tensor:
        self.decoded.append(latents)
        return torch.zeros(len(latents), 4 * latents.shape[2] - 3, 3, 8, 8)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Writes a published pipeline of a case, whose network is then that of a version."""

    def write(case: str, scheduler: dict | None = None) -> Path:
        version, network = CASES[case]
        numbers = load_case(f"nova/{network}")[0]["constructor"]
        monkeypatch.setitem(VERSIONS, version, replace(VERSIONS[version], network=numbers, size_px=tuple(SIZE)))
        place = published(tmp_path / "nova", network)
        of_clips = load_case("nova/vae_opensora_small")[0]["constructor"]
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        of_pictures = {"latent_channels": 4, "block_out_channels": [32] * 4} | blocks
        for part, config in (
            ("vae/config.json", of_clips if case == "sample_t2v" else of_pictures),
            ("scheduler/scheduler_config.json", scheduler),
        ):
            if config is not None:
                (place / part).parent.mkdir()
                (place / part).write_text(json.dumps(config), encoding="utf-8")
        return place

    return write


def arguments(keys: dict) -> list[str]:
    return [f"{key}={json.dumps(value) if isinstance(value, list) else value}" for key, value in keys.items()]


def task_of(case: str, folder: Path, **keys):
    task = TEXT_TO_IMAGE if case == "sample_t2i" else TEXT_TO_VIDEO
    given = {"generator_checkpoint_path": folder, "prompts": ["a prompt"], "device": "cpu"} | keys
    kind, config = load_task(task, arguments(given))
    return kind(config)


@pytest.mark.parametrize(("case", "name"), DRAWINGS)
def test_keys_of_the_scripts_draw_what_the_reference_draws(case, name, folder, tmp_path, monkeypatch):
    calls, tensors = load_nova(case)
    call = calls[name]
    given, expected = resolve(call["kwargs"], tensors), resolve(call["result"], tensors)["latents"]
    scheduler = call["sample_scheduler"]
    place = folder(case, {"_class_name": scheduler["class"], **scheduler["kwargs"]})
    keys = {ours: given[theirs] for theirs, ours in KEYS.items() if theirs in given}
    keys["groups"] = len(given["num_preds"])
    if case == "sample_t2v":
        keys |= {"num_frames": 4 * given["max_latent_length"] - 3}
        keys |= {"motion": given["motion_flow"][0]} if "motion_flow" in given else {}
    (first,) = given.get("latents", [None])
    if first is not None:
        Image.fromarray(np.zeros((70, 100, 3), np.uint8)).save(tmp_path / "first.png")
        keys["first_frames"] = [str(tmp_path / "first.png")]
    task = task_of(case, place, **keys)
    if case == "sample_t2v" and "motion_flow" not in given:
        task.plan = replace(task.plan, motion=None)
    monkeypatch.setattr(generation, "group_sizes", lambda tokens, steps: given["num_preds"])
    prompts = given["prompt"]
    for sample in range(2):
        rows = prompts[sample::2]
        told = {"text": rows, "lengths": torch.full((len(rows),), rows.shape[1])}
        monkeypatch.setattr(NovaNetworks, "read", lambda self, texts, told=told: told)
        draws = RecordedDraws(resolve(call["draws"], tensors), sample)
        monkeypatch.setattr(sampling, "SeededDraws", lambda random, draws=draws: draws)
        recorder = Recorder(None if first is None else first[sample, None])
        monkeypatch.setattr(
            NovaNetworks, "build_autoencoder", staticmethod(lambda settings, recorder=recorder: recorder)
        )
        if case == "sample_t2i":
            task.draw(["a prompt"], [0])
        else:
            task.draw([0], [0], lambda number, video: None)
        (latents,) = recorder.decoded
        atol = call["result_stats"]["latents"]["suggested_atol"]
        torch.testing.assert_close(latents, expected[sample, None], rtol=0, atol=atol)
        assert next(draws.noises, None) is None
        assert next(draws.step_noises, None) is None


@pytest.mark.parametrize(
    ("case", "scheduler", "keys", "message"),
    [
        ("sample_t2i", None, {"size": [64, 90]}, "size: 64 x 90 px .*; sides are multiples of 32 px"),
        ("sample_t2i", {"_class_name": "EulerDiscrete"}, {}, "is of 'EulerDiscrete'; FlowMatchEuler"),
        ("sample_t2i", {"_class_name": "DDPMScheduler", "prediction_type": "v"}, {}, "prediction_type: 'v'"),
        ("sample_t2i", {"_class_name": "FlowMatchEuler", "shift": "x"}, {}, "has shift: 'x', where a"),
        ("sample_t2i", None, {"model_version": "mini-video"}, "is NOVA's mini; write model_version"),
        ("sample_t2i", None, {"guidance": 1, "negative_prompt": "x"}, "negative_prompt: without guidance it has no"),
        ("sample_t2v", None, {"num_frames": 4}, "4 n \\+ 1|multiple"),
        ("sample_t2v", None, {"first_frames": ["a.png", "b.png"]}, "2 pictures for 1 prompts: name one for all, or"),
        ("sample_t2v", None, {"first_frames": ["a.png"]}, "a.png does not exist"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_told_before_a_network_is_built(case, scheduler, keys, message, folder, monkeypatch):
    place = folder(case, scheduler)
    with pytest.raises((UserError, ConfigError), match=message):
        task_of(case, place, **keys).draw(["a prompt"], [0])


def test_a_network_of_pictures_draws_no_clips(folder):
    place = folder("sample_t2i")
    with pytest.raises(ConfigError, match="num_frames: model_version mini draws pictures"):
        task_of("sample_t2v", place, num_frames=9)
    with pytest.raises(ConfigError, match="motion: a network of pictures is told none"):
        task_of("sample_t2v", place, motion=3)
    assert task_of("sample_t2v", place).total_frames == 1


@pytest.mark.parametrize(("case", "keys", "told"), [
    ("sample_t2i", {}, False), ("sample_t2i", {"size": SIZE}, False), ("sample_t2i", {"size": [96, 64]}, True),
    ("sample_t2i", {"image_size": 128}, True), ("sample_t2v", {"size": [64, 64]}, True), ("sample_t2v", {}, False),
])  # fmt: skip
def test_another_size_than_that_of_the_places_is_told_where_there_are_no_rotary_positions(
    case, keys, told, folder, caplog
):
    task_of(case, folder(case), **keys)
    assert ("learned places of 64 x 96 px (height x width) alone: expect less" in caplog.text) == told


def test_blank_prompts_are_the_network_s_own_empty_text(monkeypatch):
    hidden = {"text": torch.ones(3, 5, 4), "lengths": torch.tensor([2, 1, 1])}
    networks = NovaNetworks.__new__(NovaNetworks)
    networks.settings = type("Settings", (), {"version": VERSIONS["mini"]})
    monkeypatch.setattr(networks, "read_texts", lambda make, texts, told: told(hidden["text"], hidden["lengths"]))
    read = networks.read(["a b", "", " "])
    assert read["lengths"].tolist() == [2, 0, 0]
    assert read["text"].shape == (3, VERSIONS["mini"].text_length, 4)
    assert drawing.Plan((1, 8, 8), None).negative == ""


@pytest.mark.integration
@pytest.mark.slow
def test_clips_of_runs_are_drawn_as_the_run_drew_them(tmp_path):
    case = importlib.import_module("train.train_nova").TrainNova
    settings = tiny_settings(tmp_path, write_clips(tmp_path / "a.tar", 4), updates=1, save_every=1, num_frames=5)
    settings |= {
        "model_version": "mini-video", "image_size": 32, "motion_column": "flow", "sample_flow": 3.0, "seed": 3,
        "sample_prompts": ["picture w1", "w2"], "sample_groups": 2, "sample_steps": 2, "sample_guidance": 3.0,
        "ema_start_iters": 0, "loss_repeat": 1, "crop_mode": "center", "frame_rate": 4,
    }  # fmt: skip
    rows = []

    class Recorded(case):
        def sample(self, held_out):
            rows[:] = super().sample(held_out)
            return rows

    assert Recorded(make_config(case.Config, settings)).run() == 0
    expected = [row.pictures["sample"] for row in rows]

    def drawn(**keys) -> dict[int, np.ndarray]:
        given = {"run": tmp_path / "tiny", "device": "cpu", "seeds": [3, 4], "groups": 2, "steps": 2, "guidance": 3,
                 "prompts": settings["sample_prompts"], "batch_size": 2} | keys  # fmt: skip
        kind, config = load_task(TEXT_TO_VIDEO, arguments(given))
        task, videos = kind(config), {}
        assert (config.told_fps, task.total_frames) == (4, 5)
        assert task.plan.motion == keys.get("motion", 3.0)
        task.draw([0, 1], config.seeds, lambda number, video: videos.update({number: video}))
        return videos

    found = drawn()
    assert [found[number].shape for number in (0, 1)] == [(5, 32, 32, 3)] * 2
    for number, clip in enumerate(expected):
        assert np.abs(found[number].astype(int) - clip).max() <= 1
    still = drawn(motion=40.0)
    assert (still[0] != found[0]).any()
    Image.fromarray(np.full((40, 50, 3), (200, 30, 30), np.uint8)).save(tmp_path / "red.png")
    begun = drawn(first_frames=[str(tmp_path / "red.png")])
    distance = [np.abs(begun[number][0].astype(float) - (200, 30, 30)).mean() for number in (0, 1)]
    assert max(distance) < 60  # as the mini autoencoder shows it
    half = drawn(dtype="bfloat16")
    assert half[0].std() > 1
