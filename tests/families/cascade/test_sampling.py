"""A whole cascade, network after network: what it is made of, and what its pictures depend on."""

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from families.cascade import build
from families.cascade.inference import CascadeSettings, DrawingSettings
from families.cascade.sampling import Cascade
from warpcore.config import ConfigError, make_config
from warpcore.errors import UserError


@pytest.fixture
def cascade(drawing_cascade):
    return Cascade(make_config(DrawingSettings, drawing_cascade | {"batch_size": 2, "stage_b_steps": 2}))


def test_a_network_is_on_its_device_in_its_precision_while_it_works_and_then_gone(drawing_cascade):
    cascade = Cascade(make_config(DrawingSettings, drawing_cascade | {"dtype": "bfloat16"}))
    with cascade.holding("Stage C", build.stage_c) as network:
        assert {(tensor.device.type, tensor.dtype) for tensor in network.parameters()} == {("cpu", torch.bfloat16)}
        assert not network.training
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"meta"}
    assert "peak memory: " in cascade.peak_memory()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pictures_of_several_sizes_come_back_in_order_whatever_is_beside_them(drawing_cascade, dtype):
    settings = drawing_cascade | {"batch_size": 2, "stage_b_steps": 2, "stage_b_sampler": "ddim", "dtype": dtype}
    cascade = Cascade(make_config(DrawingSettings, settings))
    generator = torch.Generator().manual_seed(0)
    sizes = [(32, 32), (40, 61), (32, 32), (32, 32)]  # the second is no multiple of Stage B's 8 px
    pictures = [torch.rand(3, *size, generator=generator) for size in sizes]
    text = cascade.read(["w1", "w2", "w3", "w4", ""])["clip_text_pooled"]

    def rebuilt(rows: list[int]) -> list[torch.Tensor]:
        chosen = [sizes[row] for row in rows]
        latents = cascade.encode([pictures[row] for row in rows], [(2, 3)] * len(rows))
        assert {tuple(one.shape) for one in latents} == {(16, 2, 3)}
        return cascade.decode(
            cascade.draw_b(latents, text[rows], text[-1:], chosen, [7 + row for row in rows]), chosen
        )

    together = rebuilt([0, 1, 2, 3])
    assert [tuple(picture.shape[1:]) for picture in together] == sizes
    for row in range(4):
        torch.testing.assert_close(rebuilt([row])[0], together[row], rtol=0, atol=1e-4 if dtype == "float32" else 0.1)
    assert not torch.allclose(together[0], together[2], atol=0.1)
    stage_a = cascade.rebuild(pictures)
    assert [tuple(picture.shape[1:]) for picture in stage_a] == sizes


def test_stage_b_sees_latents_and_text_guides_away_from_neither_and_has_noise_of_its_own(cascade, monkeypatch):
    calls = {"stage_b": [], "stage_c": []}

    def watched(name: str, make):
        def build_watched(*args, **kwargs):
            network = make(*args, **kwargs)
            network.register_forward_pre_hook(lambda _, a, k: calls[name].append((*a, k)), with_kwargs=True)
            return network

        return build_watched

    for name in calls:
        monkeypatch.setattr(build, name, watched(name, getattr(build, name)))
    text = cascade.read(["w1", "w2"])
    sides = [{name: part[i : i + 1] for name, part in text.items()} for i in range(2)]
    latents = cascade.draw_c(*sides, (64, 64), [5], steps=2, guidance=2.0)
    cascade.draw_b(latents, *(side["clip_text_pooled"] for side in sides), [(64, 64)], [5])
    x, _, conditions = calls["stage_b"][0]
    torch.testing.assert_close(conditions["effnet"], torch.stack([latents[0], torch.zeros_like(latents[0])]))
    torch.testing.assert_close(conditions["clip"], text["clip_text_pooled"])
    assert conditions.keys() == {"effnet", "clip"}
    of_c, of_b = calls["stage_c"][0][0][0].flatten(), x[0].flatten()
    assert not torch.isclose(of_c[: len(of_b)], of_b[: len(of_c)]).any()


def test_a_picture_too_small_for_stage_b_is_refused(cascade):
    text = cascade.read([""])["clip_text_pooled"]
    with pytest.raises(UserError, match="less than 16 px"):
        cascade.draw_b([torch.zeros(16, 1, 1)], text, text, [(12, 64)], [0])


@pytest.fixture
def run(tmp_path):
    """Makes a folder as a training run leaves it."""

    def run(name: str, weights: dict[str, str], **config):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump({"diffusion_target": "epsilon"} | config))
        for ours, source in weights.items():
            save_file(load_file(tmp_path / f"{source}.safetensors"), folder / f"{ours}.safetensors")
        return folder

    return run


def test_several_runs_make_one_cascade(drawing_cascade, run, tmp_path):
    stage_c = run("c", {"generator": "generator", "generator_ema": "generator"}, model_version="1B",
                  diffusion_target="v", generator_checkpoint_path="before.safetensors")  # fmt: skip
    stage_b = run("b", {"generator": "stage_b"}, model_version="700M", diffusion_target="x0")
    stage_a = run("a", {"stage_a": "stage_a", "stage_a_ema": "stage_a"}, model_version="mini")
    settings = make_config(CascadeSettings, {"run": [str(stage_a), str(stage_c), str(stage_b)]})
    assert (settings.model_version, settings.diffusion_target) == ("1B", "v")
    assert settings.generator_checkpoint_path == stage_c / "generator_ema.safetensors"
    assert settings.stage_a_checkpoint_path == stage_a / "stage_a_ema.safetensors"
    assert settings.stage_b.model_version == "700M"
    assert settings.stage_b.diffusion_target == "x0"
    assert settings.stage_b.generator_checkpoint_path == stage_b / "generator.safetensors"
    plain = make_config(CascadeSettings, {"run": str(stage_c), "use_ema": False, "diffusion_target": "x0"})
    assert plain.generator_checkpoint_path == stage_c / "generator.safetensors"
    assert plain.diffusion_target == "x0"
    assert plain.stage_b.model_version == "700M"


def test_weights_say_what_their_network_predicts(drawing_cascade, tmp_path):
    for name, target in (("generator", "v"), ("stage_b", "x0")):
        file = tmp_path / f"{name}.safetensors"
        save_file(load_file(file), file, metadata={"diffusion_target": target})
    settings = make_config(DrawingSettings, drawing_cascade)
    assert (settings.diffusion_target, settings.stage_b.diffusion_target) == ("v", "x0")
    given = make_config(DrawingSettings, drawing_cascade | {"diffusion_target": "epsilon", "stage_b_target": "v"})
    assert (given.diffusion_target, given.stage_b.diffusion_target) == ("epsilon", "v")


def test_a_folder_that_is_no_run_and_one_without_weights_are_named(run, tmp_path):
    for folder, words in ((tmp_path, "is no training run"), (run("empty", {}), "holds no weights yet")):
        with pytest.raises(ConfigError, match=words):
            make_config(CascadeSettings, {"run": str(folder)})
