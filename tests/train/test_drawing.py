"""Sample pictures of a run that names nothing to draw, and of one that can't draw."""

from pathlib import Path

import pytest
import torch

from tests.many_processes import launch_processes
from tests.train.test_every_script import OF_CLIPS, SETTINGS, settings, use_case  # noqa: F401
from tests.warpcore.runs import read_metrics, tiny_settings, train_here, write_shard
from tests.warpcore.tiny import Denoiser
from warpcore.config import make_config
from warpcore.errors import UserError

pytestmark = pytest.mark.integration


def samples_of(settings: dict) -> list[str]:  # noqa: F811
    folder = Path(settings["checkpoint_path"]) / settings["experiment_id"] / "samples"
    return sorted(path.name for path in folder.glob("*"))


@pytest.mark.parametrize(
    "name",
    ["train_c_controlnet", *(pytest.param(name, marks=pytest.mark.slow)
                             for name in sorted(SETTINGS.keys() - {"train_towers", "train_towers t5",
                                                                   "train_c_controlnet"}))],
)  # fmt: skip
def test_a_run_without_prompts_and_validation_draws_for_training_data_and_says_so_once(settings, name, capfd):  # noqa: F811
    given = settings(name, "run", validation_samples=0, updates=2, save_every=1)
    assert use_case(name)(make_config(use_case(name).Config, given)).run() == 0
    of_clips = [".mp4", ".png", ".webp"] if name in OF_CLIPS else [".png"]
    assert samples_of(given) == [f"0000000{update}{kind}" for update in (1, 2) for kind in of_clips]
    assert capfd.readouterr().err.count("samples of the training data") == 1


class Seeing(Denoiser):
    seen: list[list[str]]

    def sample(self, held_out):
        self.seen.append(held_out.captions)
        return super().sample(held_out)


def test_training_data_to_draw_for_are_the_same_at_every_save_and_start_whatever_the_seed(tmp_path):
    data, Seeing.seen = write_shard(tmp_path / "a.tar", 40), []
    for seed in (0, 1):
        train_here(tiny_settings(tmp_path / str(seed), data, save_every=2, updates=4, seed=seed), Seeing)
    assert len(Seeing.seen) > 4
    assert all(captions == Seeing.seen[0] for captions in Seeing.seen)
    assert len(set(Seeing.seen[0])) == 16


def test_given_prompts_are_drawn_and_no_training_data(settings, capfd):  # noqa: F811
    given = settings("train_c", "run", validation_samples=0, updates=1, sample_prompts=["w1"])
    use_case("train_c")(make_config(use_case("train_c").Config, given)).run()
    assert samples_of(given) == ["00000001.png"]
    assert "samples of the training data" not in capfd.readouterr().err


def test_a_lora_draws_for_what_it_learns_and_not_for_what_it_should_not_forget(settings, tmp_path):  # noqa: F811
    prior = write_shard(tmp_path / "prior.tar", 60, (64, 64), first=100)
    given = settings("train_c_lora", "run", validation_samples=0, updates=1, prior_path=str(prior))
    kind, seen = use_case("train_c_lora"), []

    class SeeingLora(kind):
        def sample(self, held_out):
            seen.append(held_out.captions)
            return super().sample(held_out)

    SeeingLora(make_config(kind.Config, given)).run()
    assert seen
    assert all(int(caption.split()[1]) < 100 for captions in seen for caption in captions)


class TooLarge(Denoiser):
    def sample(self, held_out):
        raise self.shortage


@pytest.mark.parametrize(
    "shortage",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError(),
     RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")],
)  # fmt: skip
def test_too_little_memory_to_draw_is_told_once_and_never_ends_the_run(shortage, tmp_path, capfd):
    TooLarge.shortage = shortage
    settings = tiny_settings(tmp_path, write_shard(tmp_path / "a.tar", 6), updates=4, save_every=1)  # noqa: F811
    assert train_here(settings, TooLarge)[0] == 0
    assert capfd.readouterr().err.count("no more sample pictures are drawn: there is too little memory") == 1


class TooLargeForOne(Denoiser):
    """In which the second process alone is short of memory."""

    def sample(self, held_out):
        if self.processes.rank == 1:
            raise MemoryError
        return super().sample(held_out)


def test_memory_that_is_too_short_on_one_process_stops_drawing_on_all(tmp_path):
    data = write_shard(tmp_path / "a.tar", 6)
    settings = tiny_settings(tmp_path, data, updates=3, save_every=1, process_timeout_seconds=20)  # noqa: F811
    launch_processes(2, train_here, settings, TooLargeForOne)
    assert len(read_metrics(settings)) == 3
    assert samples_of(settings) == []


def test_a_previewer_that_was_not_downloaded_is_told_once_and_never_ends_the_run(settings, tmp_path, capfd):  # noqa: F811
    (tmp_path / "previewer.safetensors").unlink()
    given = settings("train_c", "run", updates=2, save_every=1)
    kind = use_case("train_c")
    assert kind(make_config(kind.Config, given)).run() == 0
    told = capfd.readouterr().err
    assert told.count(f"there are no weights of the previewer in {tmp_path}/previewer.safetensors") == 1
    assert samples_of(given) == []
    with pytest.raises(UserError, match="previewer_checkpoint_path"):  # where one was named, it has to be there
        kind(
            make_config(kind.Config, given | {"previewer_checkpoint_path": str(tmp_path / "other.safetensors")})
        ).run()
