"""From a LoRA's training to pictures with its exported file, by the programs that a user starts."""

import sys

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPTokenizer

from families.common.lora_files import write_loras
from families.stable_diffusion import build
from families.stable_diffusion.config import SdSettings
from families.stable_diffusion.text_to_image import StableDiffusionTextToImage
from inference import text_to_image
from tests.families.common.tiny_clip import write_encoder
from tests.families.stable_diffusion.test_drawing_sources import lora_on
from tests.families.stable_diffusion.test_train_sd import settings_of
from tests.families.stable_diffusion.tiny_pipeline import SD15_UNET, write_sd15
from tools import export
from train.train_sd_lora import TrainSdLora
from warpcore.config import make_config

pytestmark = pytest.mark.integration
LORA = {
    "module_filters": ["to_q", "to_out"], "rank": 2, "text_encoder_filters": ["self_attn"], "lr": 0.05, "dora": True,
    "train_tokens": [["[fernando]", "^p"]], "updates": 2, "save_every": 2, "sample_prompts": ["a [fernando]"],
}  # fmt: skip
DRAWING = {"size": [64, 64], "steps": 2, "sampler": "ddim", "prompts": ["a [fernando] p"]}


@pytest.fixture
def call(monkeypatch):
    """Run a program of the project."""

    def run(program, *words) -> None:
        monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, words)])
        program.main()

    return run


@pytest.fixture
def base(tmp_path):
    return write_sd15(tmp_path / "pipeline", "clip")


def trained(folder, kind=TrainSdLora, **changes):
    """The folder of a LoRA's run."""
    settings = settings_of(folder, "sd15") | LORA | changes
    given = {key: value for key, value in settings.items() if key in kind.Config.model_fields}
    assert kind(make_config(kind.Config, given)).run() == 0
    return folder / settings["experiment_id"]


def drawn(**settings) -> torch.Tensor:
    config = make_config(StableDiffusionTextToImage.Config, DRAWING | settings)
    return StableDiffusionTextToImage(config).draw(config.prompts, [0]).pictures[0]


@pytest.mark.slow
def test_a_lora_is_trained_exported_for_kohya_s_scripts_and_drawn_with_strengths(base, tmp_path, call):
    run, file = trained(tmp_path), tmp_path / "exported" / "dog.safetensors"
    call(export, "lora-kohya", run, file, f"generator_checkpoint_path={base}")
    assert (file.parent / "dog_embeddings" / "fernando.safetensors").is_file()

    whole = drawn(run=[run])
    torch.testing.assert_close(drawn(generator_checkpoint_path=base, lora=[str(file)]), whole, atol=1e-4, rtol=0)
    half = drawn(generator_checkpoint_path=base, lora=[f"{file}:0.5"])
    assert min((half - other).abs().max() for other in (whole, drawn(generator_checkpoint_path=base))) > 1e-3

    places = [f"generator_checkpoint_path={base}", f"lora={file}:0.5", f"output_path={tmp_path / 'drawn'}"]
    call(text_to_image, *places, "size=[64, 64]", "steps=2", "sampler=ddim", "prompts=a [fernando] p")
    written = pil_to_tensor(Image.open(tmp_path / "drawn" / "0000_a_fernando_p_0.png")) / 255
    torch.testing.assert_close(written, half, atol=1 / 255, rtol=0)

    again = trained(tmp_path, experiment_id="again", lora_checkpoint_path=str(file), lr=1e-12, updates=1, save_every=1)
    before, after = (load_file(folder / "lora.safetensors") for folder in (run, again))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if not name.endswith(("tokens.initial", "tokens.delta")):  # of an embedding only their sum is known
            torch.testing.assert_close(after[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.fixture
def wide(base):
    """The pipeline with some matrices of 128 x 128, which four-bit blocks divide."""
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    write_encoder(base / "text_encoder", tokenizer, seed=1, width=128, heads=4)
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 12, 128, 128), "cross_attention_dim": 128}
    UNet2DConditionModel(**SD15_UNET | sizes).save_pretrained(base / "unet")
    return base


@pytest.mark.slow
@pytest.mark.bits
def test_a_lora_on_networks_in_four_bits_is_trained_resumed_and_drawn(wide, tmp_path):
    torchao = pytest.importorskip("torchao.quantization", reason="an optional package")
    packed = {}

    class Counted(TrainSdLora):
        def build(self):
            networks = super().build()
            for name in ("generator", "text"):
                packed[name] = sum(isinstance(p.data, torchao.NF4Tensor) for p in networks[name].parameters())
            return networks

    four_bits = {"frozen_weights": "nf4", "text_encoder_precision": "nf4", "dtype": "bfloat16", "dora": False}
    whole = trained(tmp_path, Counted, experiment_id="whole", **four_bits)
    assert packed["generator"] > 0
    assert packed["text"] > 0
    for updates in (1, 2):
        halves = trained(tmp_path, experiment_id="halves", updates=updates, save_every=1, **four_bits)
    ours, theirs = (load_file(run / "lora.safetensors") for run in (whole, halves))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    picture = drawn(run=[whole], text_encoder_precision="nf4")
    exact = drawn(run=[whole], text_encoder_precision="float32")
    assert 1e-4 < (picture - exact).abs().mean() < 0.1


@pytest.mark.slow
def test_a_lora_whose_rank_follows_the_noise_is_drawn_so_and_its_file_elsewhere_with_its_full_rank(base, tmp_path):
    run = trained(tmp_path, generator_checkpoint_path=str(base), dora=False, min_rank=1)
    tensors, file, pictures = load_file(run / "lora.safetensors"), tmp_path / "other.safetensors", []
    with safe_open(run / "lora.safetensors", "pt") as opened:
        about = opened.metadata()
    assert about["min_rank"] == "1"
    torch.manual_seed(0)
    for name in (name for name in tensors if name.endswith(".up")):
        tensors[name] += 0.3 * torch.randn_like(tensors[name])  # two updates hardly change a picture
    save_file(tensors, run / "lora.safetensors", about)
    for said in ({}, {"min_rank": "2"}, {"min_rank": "1"}):
        save_file(tensors, file, {key: value for key, value in about.items() if key != "min_rank"} | said)
        pictures.append(drawn(generator_checkpoint_path=base, lora=[str(file)]))
    merged, beside, following = pictures
    torch.testing.assert_close(beside, merged, rtol=0, atol=1e-3)
    assert (following - merged).abs().max() > 0.01
    torch.testing.assert_close(drawn(run=[run], use_ema=False), following, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_lora_changes_text_encoders_that_are_kept_in_four_bits(wide, tmp_path):
    pytest.importorskip("torchao.quantization", reason="an optional package")
    text = build.text_encoders(make_config(SdSettings, {"generator_checkpoint_path": str(wide)})).encoders[0].model
    lora = lora_on(text, "out_proj", 2)
    write_loras({"text_encoder": lora}, tmp_path / "text.safetensors", "kohya", {"text_encoder": text})
    given = {"generator_checkpoint_path": wide, "prompts": ["a p"], "lora": [f"{tmp_path}/text.safetensors:0.2"]}
    found, exact, plain = drawn(**given, text_encoder_precision="nf4"), drawn(**given), drawn(**given | {"lora": []})
    assert (found - exact).abs().mean() < (plain - exact).abs().mean()


@pytest.mark.slow
def test_a_checkpoint_with_two_loras_in_it_draws_as_the_two_together(base, tmp_path, call):
    """Lengths of DoRA are those of the base, so the second must not see what the first did to it."""
    files = []
    for seed in (1, 2):
        run = trained(tmp_path, experiment_id=f"run{seed}", seed=seed, train_tokens=None, module_filters=["to_q"])
        tensors = load_file(run / "lora.safetensors")
        for name in [name for name in tensors if name.endswith(".up")]:
            tensors[name] += 0.3 * torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(seed))
        save_file(tensors, tmp_path / f"{seed}.safetensors", {"alpha": "2", "rank": "2", "model_version": "sd15"})
        files.append(f"{tmp_path / str(seed)}.safetensors:0.8")
    call(export, "diffusers", base, tmp_path / "merged", f"lora={files}")
    together = drawn(generator_checkpoint_path=base, lora=files, prompts=["a p"])
    found = drawn(generator_checkpoint_path=tmp_path / "merged", prompts=["a p"])
    torch.testing.assert_close(found, together, atol=1e-4, rtol=0)
    assert (drawn(generator_checkpoint_path=base, lora=files[:1], prompts=["a p"]) - together).abs().max() > 1e-3
