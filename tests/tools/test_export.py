"""A cascade written for diffusers draws the same pictures there, and comes back with the same bits."""

import importlib
import sys
from types import SimpleNamespace

import diffusers.schedulers.scheduling_ddpm_wuerstchen as wuerstchen
import pytest
import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
)
from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from families.cascade.diffusers_folder import unet_config
from families.cascade.inference import DrawingSettings
from families.cascade.sampling import Cascade
from families.cascade.versions import VERSIONS
from families.common.transformers_text import tokenizer
from modules.clip import ClipSettings, TextTower, text_tower
from modules.stage_b import StageB
from modules.stage_c import StageC
from tools.export import main
from warpcore.config import make_config
from warpcore.errors import UserError
from warpcore.random import SampleRandom, stable_hash

PROMPTS, SEEDS, SIZE = ["picture w1", "W2, and w3!"], [3, 4], (64, 96)
C_SHAPE, B_SHAPE = (16, 4, 6), (4, 16, 24)


@pytest.fixture
def export(monkeypatch):
    def export(*arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        main()

    return export


@pytest.fixture
def pipelines(export, drawing_cascade, tmp_path):
    """diffusers' two pipelines of the small cascade, exported with further arguments."""

    def pipelines(*arguments: str):
        export("diffusers", drawing_cascade["generator_checkpoint_path"], tmp_path / "exported", "model_version=mini",
               *arguments)  # fmt: skip
        made = [
            kind.from_pretrained(tmp_path / "exported" / name, dtype=torch.float32)
            for kind, name in ((StableCascadePriorPipeline, "prior"), (StableCascadeDecoderPipeline, "decoder"))
        ]
        for pipeline in made:
            pipeline.set_progress_bar_config(disable=True)
        return made

    return pipelines


def within_range(folder, contrast: float) -> None:
    """Let Stage A give pictures around grey, so that few of their numbers are cut off at 0 and 1."""
    state = load_file(folder / "stage_a.safetensors")
    state["out_block.0.weight"] *= contrast
    state["out_block.0.bias"][:] = 0.5
    save_file(state, folder / "stage_a.safetensors")


def assert_same_pictures(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.std() > 0.05
    assert ((ours > 0) & (ours < 1)).float().mean() > 0.9
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def our_pictures(settings: dict, **changes) -> torch.Tensor:
    settings = make_config(DrawingSettings, settings | {"guidance_rescale": 0, "stage_b_guidance": 1.5} | changes)
    cascade = Cascade(settings)
    text = cascade.read([*PROMPTS, ""])
    conditions, unconditional = ({name: part[rows] for name, part in text.items()} for rows in (slice(2), slice(2, 3)))
    sampler = settings.stage_b_sampler
    latents = cascade.draw_c(conditions, unconditional, SIZE, SEEDS, steps=20, guidance=4.0, guidance_rescale=0,
                             sampler=sampler)  # fmt: skip
    pooled = [part["clip_text_pooled"] for part in (conditions, unconditional)]
    return torch.stack(cascade.decode(cascade.draw_b(latents, *pooled, [SIZE] * 2, SEEDS), [SIZE] * 2))


def their_pictures(prior, decoder, monkeypatch) -> torch.Tensor:
    """What diffusers draws from our noise."""
    stage_c, stage_b = SampleRandom(SEEDS), SampleRandom([stable_hash(seed, "Stage B") for seed in SEEDS])

    def draws(random: SampleRandom, shape: tuple) -> None:
        steps = iter(range(1000))
        monkeypatch.setattr(
            wuerstchen, "randn_tensor", lambda *_, **__: random.normal(f"noise of step {next(steps)}", *shape)
        )

    draws(stage_c, C_SHAPE)
    latents = prior(
        PROMPTS, height=SIZE[0], width=SIZE[1], num_inference_steps=20, guidance_scale=4.0, output_type="pt",
        latents=stage_c.normal("initial noise", *C_SHAPE),
    ).image_embeddings  # fmt: skip
    draws(stage_b, B_SHAPE)
    return decoder(
        latents, PROMPTS, num_inference_steps=10, guidance_scale=1.5, output_type="pt",
        latents=stage_b.normal("initial noise", *B_SHAPE),
    ).images  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("target", ["epsilon", "v", "x0"])
def test_diffusers_draws_the_same_pictures(pipelines, drawing_cascade, monkeypatch, tmp_path, target):
    within_range(tmp_path, contrast=0.01 if target == "epsilon" else 1)  # of random noise predictions, x0 are huge
    targets = {"diffusion_target": target, "stage_b_target": target}
    given = [f"{key}={value}" for key, value in targets.items()]
    theirs = their_pictures(*pipelines(*given, "ddim=true"), monkeypatch)
    assert_same_pictures(our_pictures(drawing_cascade | targets, stage_b_sampler="ddim"), theirs)


class PublishedSteps(DDPMWuerstchenScheduler):
    """diffusers' ancestral scheduler with the two things that the published sampler does differently.

    At t = 1, where the schedule's noise is clamped, the network is told the time that has this noise, 0.994, and not
    1. And what counts is the clean signal found in the last step, and not its sample, in which some noise is left.
    """

    def set_timesteps(self, number, device=None):
        times = torch.linspace(1, 0, number + 1)
        angle = (self._alpha_cumprod(times, "cpu") * self._init_alpha_cumprod).sqrt().acos()
        times[0] = (angle / (torch.pi / 2) * (1 + self.s) - self.s)[0]
        super().set_timesteps(timesteps=times)

    def step(self, model_output, timestep, sample, generator=None):
        if self.previous_timestep(timestep)[0] > 0:
            return super().step(model_output, timestep, sample, generator)
        signal = self._alpha_cumprod(timestep, "cpu")[:, None, None, None]
        return SimpleNamespace(prev_sample=(sample - (1 - signal).sqrt() * model_output) / signal.sqrt())


@pytest.mark.integration
def test_the_published_sampler_differs_from_that_of_diffusers_in_two_known_things(
    pipelines, drawing_cascade, monkeypatch, tmp_path
):
    within_range(tmp_path, contrast=0.01)
    prior, decoder = pipelines()
    assert type(prior.scheduler) is type(decoder.scheduler) is DDPMWuerstchenScheduler
    ours, theirs = our_pictures(drawing_cascade), their_pictures(prior, decoder, monkeypatch)
    assert (ours - theirs).abs().mean() > 1e-3
    prior.scheduler, decoder.scheduler = PublishedSteps(), PublishedSteps()
    assert_same_pictures(ours, their_pictures(prior, decoder, monkeypatch))


def test_weights_come_back_bit_by_bit(export, drawing_cascade, tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "generator.safetensors").items()}
    save_file(half, tmp_path / "generator.safetensors", metadata={"diffusion_target": "v", "update": "7"})
    export("diffusers", tmp_path / "generator.safetensors", tmp_path / "exported", "model_version=mini")
    export("from-diffusers", tmp_path / "exported", tmp_path / "imported")
    files = {"stage_c": "generator", "stage_b": "stage_b", "stage_a": "stage_a", "text_tower": "text"}
    for theirs, ours in files.items():
        with safe_open(tmp_path / "imported" / f"{theirs}.safetensors", "pt") as file:
            before = load_file(tmp_path / f"{ours}.safetensors")
            assert file.keys() == sorted(before)
            for name, tensor in before.items():
                assert file.get_tensor(name).dtype == tensor.dtype
                assert torch.equal(file.get_tensor(name), tensor), name
            if theirs.startswith("stage_") and theirs != "stage_a":
                assert file.metadata()["diffusion_target"] == {"stage_c": "v", "stage_b": "epsilon"}[theirs]
    before, after = (
        text_tower(path=tmp_path / name) for name in ("text.safetensors", "imported/text_tower.safetensors")
    )
    assert torch.equal(before.tokenize(PROMPTS)[0], after.tokenize(PROMPTS)[0])


@pytest.mark.parametrize("version", ["3.6B", "1B", "mini"])
def test_the_networks_of_every_size_are_known_to_diffusers(version):
    version = VERSIONS[version]
    for kind, arguments in ((StageC, version.stage_c), (StageB, version.stage_b)):
        with torch.device("meta"):
            theirs = StableCascadeUNet(**unet_config(kind, arguments))
            state = convert_stable_cascade_unet_single_file_to_diffusers(kind(**arguments).state_dict())
        theirs.load_state_dict(state, strict=True, assign=True)


@pytest.mark.parametrize("words", [["a", "red", "circle", ",", ":", "größe"], None])
def test_a_tokenizer_of_transformers_gives_our_ids(tmp_path, words):
    config = {"width": 8, "heads": 2, "layers": 1, "context_length": 12}
    tower = TextTower(ClipSettings(embed_dim=6, text_cfg=config, words=words, quick_gelu=True))
    tokenizer(tower).save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["A red  circle, größe: x", "", "a\tred\ncircle " * 9, "it's 25 RED circles_2 … 'quoted'", "日本 🙂"]
    found = theirs(
        texts, padding="max_length", max_length=theirs.model_max_length, truncation=True, return_tensors="pt"
    )
    ids, mask = tower.tokenize(texts)
    assert torch.equal(found.input_ids, ids)
    assert torch.equal(found.attention_mask.bool(), mask)


def test_a_mistake_is_named(export, drawing_cascade, tmp_path):
    weights = drawing_cascade["generator_checkpoint_path"]
    with pytest.raises(UserError, match="nowhere does not exist"):
        export("diffusers", "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="is not empty: name another folder"):
        export("diffusers", weights, tmp_path, "model_version=mini")
    with pytest.raises(UserError, match=r"cannot draw .* rectified_flows; train one with epsilon, x0, v"):
        export("diffusers", weights, tmp_path / "out", "model_version=mini", "diffusion_target=rectified_flows")
    with pytest.raises(UserError, match="made for another network"):
        export("diffusers", tmp_path / "previewer.safetensors", tmp_path / "out", "model_version=mini")
    with pytest.raises(UserError, match="no pipeline of diffusers"):
        export("from-diffusers", tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="stage_a_checkpoint_path: nowhere does not exist"):
        export("diffusers", weights, tmp_path / "out", "model_version=mini", "--stage_a_checkpoint_path", "nowhere")
    with pytest.raises(UserError, match=r"no format lora-diffusers; it has:[^#]*\n  lora-comfyui: a file for Comfy"):
        export("lora-diffusers", weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_stage_b_only_the_prior_is_written(export, drawing_cascade, tmp_path, capsys):
    (tmp_path / "stage_b.safetensors").unlink()
    export("diffusers", drawing_cascade["generator_checkpoint_path"], tmp_path / "out", "model_version=mini")
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["prior"]
    assert "no weights of Stage B" in capsys.readouterr().out


@pytest.mark.parametrize(
    "module", ["cascade.exports", "cosmos.exports", "dit.pixart_exports", "stable_diffusion.exports"]
)
def test_a_run_without_a_lora_says_what_it_holds(module, tmp_path):
    (tmp_path / "config.yaml").write_text("experiment_id: a")
    save_file({"a": torch.zeros(1)}, tmp_path / "generator.safetensors")
    exports = importlib.import_module(f"families.{module}")
    with pytest.raises(UserError, match=r"holds no lora\.safetensors, but generator\.safetensors"):
        exports.export_lora("lora-kohya", tmp_path, tmp_path / "x.safetensors", [])
