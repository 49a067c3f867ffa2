"""Pictures with LoRAs and ControlNets, through the script's command line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from families.cascade import build
from families.cascade.config import ModelSettings
from families.cascade.controlnet import ControlNetSettings, file_metadata, make_controlnet, make_filter
from families.cascade.lora_files import write_lora
from families.cascade.lora_formats import Lora
from families.common.weight_files import metadata_of
from inference.reconstruct import main as reconstruct
from inference.text_to_image import main
from modules.previewer import Previewer
from tools.export import main as export
from train.train_c_controlnet import TrainControlNet
from train.train_c_lora import TrainLora
from warpcore.config import make_config
from warpcore.errors import UserError
from warpcore.pictures import read_metadata

SIDE = 64


@pytest.fixture
def draw(monkeypatch, tmp_path, drawing_cascade):
    """Draws with the base, and returns pictures (H, W, 3), of 0 to 255, in the order of prompts and seeds."""
    torch.manual_seed(0)
    previewer = {
        name: torch.randn(tensor.shape) * 3 / tensor[0].numel() ** 0.5 if tensor.dim() == 4 else tensor
        for name, tensor in Previewer(c_hidden=8).state_dict().items()
    }
    save_file(previewer, tmp_path / "previewer.safetensors")  # one that shows what differs

    def draw(*arguments: object, base: bool = True, whole: bool = False) -> list[np.ndarray]:
        folder = tmp_path / f"pictures{len(list(tmp_path.iterdir()))}"
        weights = [f"{key}={value}" for key, value in drawing_cascade.items()] if base else ["device=cpu"]
        fixed = [*weights, f"image_size={SIDE}", "steps=4", "sampler=ddim", f"output_path={folder}"]
        if not any("prompt" in str(argument) for argument in arguments):
            fixed.append("prompts=[w1 w2]")
        monkeypatch.setattr(
            "sys.argv", ["text_to_image.py", *fixed, f"preview={not whole}", "stage_b_steps=2", *map(str, arguments)]
        )
        main()
        draw.files = sorted(folder.glob("*.png"))
        return [np.array(Image.open(path)).astype(int) for path in draw.files if path.name[:4].isdigit()]

    return draw


def same(one: list[np.ndarray], other: list[np.ndarray], within: int = 0) -> bool:
    return all(np.abs(a - b).max() <= within for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------------ LoRA


@pytest.fixture
def lora_run(small_cascade) -> Path:
    """A run that trained a LoRA with a token, whose weights then became large enough to be seen."""
    settings = small_cascade | {
        "experiment_id": "dog", "module_filters": [".attn", "depthwise"], "rank": 3, "ema_start_iters": 1,
        "train_tokens": [["[dog]", "^picture</w>"]], "diffusion_target": "v",
    }  # fmt: skip
    TrainLora(make_config(TrainLora.Config, settings)).run()
    folder = Path(settings["checkpoint_path"]) / "dog"
    for name, seed in (("lora", 1), ("lora_ema", 2)):
        enlarge(folder / f"{name}.safetensors", seed)
    return folder


def enlarge(file: Path, seed: int) -> None:
    generator, about = torch.Generator().manual_seed(seed), metadata_of(file)
    tensors = {name: torch.randn(t.shape, generator=generator) * 0.3 for name, t in load_file(file).items()}
    save_file(tensors, file, metadata=about)


@pytest.mark.integration
def test_a_lora_of_no_strength_is_none_and_a_run_is_its_base_with_its_lora(draw, lora_run):
    plain = draw("diffusion_target=v")
    files = [f"lora={lora_run}/{name}.safetensors" for name in ("lora_ema", "lora")]
    averaged, last = (draw(file, "diffusion_target=v") for file in files)
    assert not same(plain, averaged, within=2)
    assert not same(averaged, last, within=2)
    assert same(draw(f"lora={lora_run}/lora.safetensors:0", "diffusion_target=v"), plain)
    of_run = draw("--run", lora_run, base=False)
    assert same(of_run, averaged)
    assert "lora_ema.safetensors" in read_metadata(draw.files[0])["settings"]
    assert same(draw("--run", lora_run, "use_ema=false", base=False), last)
    assert same(draw("--lora", f"{lora_run}:1", "diffusion_target=v"), averaged)
    assert same(draw("--lora", lora_run, "use_ema=false", "diffusion_target=v"), last)


@pytest.mark.integration
def test_a_lora_draws_what_the_weights_with_it_merged_in_draw(draw, lora_run, monkeypatch, tmp_path):
    merged = tmp_path / "merged.safetensors"
    monkeypatch.setattr("sys.argv", ["export.py", "lora-merged", str(lora_run), str(merged), "strength=0.5"])
    export()
    prompts = 'prompts=["w1", "a picture of [dog]"]'
    with_lora = draw(f"lora={lora_run}:0.5", prompts, "diffusion_target=v", whole=True)
    tokens = f"lora={tmp_path}/merged_embeddings/dog.safetensors"
    assert same(draw(f"generator_checkpoint_path={merged}", tokens, prompts, whole=True), with_lora)
    untaught, taught = draw(f"generator_checkpoint_path={merged}", prompts, whole=True)
    assert same([untaught], with_lora[:1])
    assert not same([taught], with_lora[1:], within=2)


@pytest.mark.slow
@pytest.mark.integration
def test_several_loras_add_up_in_any_order(draw, lora_run, tmp_path):
    for name in ("a", "b"):  # without the token, which only one of them may have
        tensors = load_file(lora_run / "lora.safetensors")
        adapters = {key: tensor for key, tensor in tensors.items() if not key.startswith("tokens.")}
        about = metadata_of(lora_run / "lora.safetensors") | {"tokens": "[]"}
        save_file(adapters, tmp_path / f"{name}.safetensors", metadata=about)
        enlarge(tmp_path / f"{name}.safetensors", ord(name))
    a, b = (f"{tmp_path}/{name}.safetensors" for name in "ab")
    both = draw("--lora", f"{a}:0.5", "--lora", b)
    assert same(draw("--lora", b, "--lora", f"{a}:0.5"), both, within=1)
    assert same(draw("--lora", f"{a}:0.25", "--lora", b, "--lora", f"{a}:0.25"), both, within=1)
    assert not same(draw("--lora", b), both, within=2)
    assert same(draw("--lora", b, "--lora", f"{b}:-1"), draw(), within=1)


@pytest.mark.slow
@pytest.mark.integration
def test_a_token_changes_only_texts_that_hold_it(draw, lora_run, tmp_path):
    tokens = {name: t for name, t in load_file(lora_run / "lora.safetensors").items() if name.startswith("tokens.")}
    lora = Lora({}, ["[dog]"], tokens["tokens.initial"], tokens["tokens.delta"] * 10)
    write_lora(lora, tmp_path / "tokens.safetensors")
    prompts = 'prompts=["w1 w2", "w1 [dog]", "w1 [DOG] w2"]'
    without, once, twice = (draw(prompts, f"lora={tmp_path}/tokens.safetensors:{strength}") for strength in (0, 1, 2))
    assert same(without[:1], draw(prompts)[:1])
    assert same(once[:1], without[:1])
    for pictures in ((once, without), (twice, once)):
        for one, other in list(zip(*pictures, strict=True))[1:]:
            assert not same([one], [other], within=2)


# ------------------------------------------------------------------ ControlNets


@pytest.fixture
def controlnet(drawing_cascade, tmp_path):
    """Makes the file of a ControlNet whose residuals are large enough to be seen."""

    def controlnet(name: str, seed: int = 0, params: dict | None = None, mode: str | None = None, **about) -> Path:
        torch.manual_seed(seed)
        model = ModelSettings(**{key: value for key, value in drawing_cascade.items() if key != "device"})
        made = ControlNetSettings(
            controlnet_filter=name, controlnet_filter_params=params, controlnet_blocks=[1, 4],
            controlnet_bottleneck_mode=mode,
        )  # fmt: skip
        network = make_controlnet(made, model, make_filter(made), build.stage_c(model).residual_widths)
        for projection in network.projections:
            torch.nn.init.normal_(projection[-1].weight)
        file = tmp_path / f"{name}{seed}.safetensors"
        state = {key: tensor.contiguous() for key, tensor in network.state_dict().items()}
        save_file(state, file, metadata=file_metadata(made))
        return file

    return controlnet


@pytest.fixture
def picture(tmp_path):
    """Makes a picture of H x W px with a light box in its middle."""

    def picture(name: str, height: int = SIDE, width: int = SIDE, inside: int = 255, outside: int = 0) -> Path:
        pixels = np.full((height, width, 3), outside, np.uint8)
        pixels[height // 4 : -height // 4, width // 4 : -width // 4] = inside
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name

    return picture


CANNY = {"resize": None}


@pytest.mark.integration
def test_a_controlnet_counts_by_its_strength_in_its_part_of_the_sampling(draw, controlnet, picture):
    plain, square = draw(), picture("square.png")
    with_control = ("--controlnet", controlnet("CannyFilter", params=CANNY), "--control-image", square)
    controlled = draw(*with_control, "seeds=[0, 1]", 'prompts=["w1 w2", "w3"]')
    assert not same(controlled[:1], plain, within=2)
    condition = np.array(Image.open(draw.files[-2]))
    assert [path.name for path in draw.files[-2:]] == ["condition_0.png", "grid.png"]
    edges = condition[:, :, 0].any(axis=0).nonzero()[0]
    assert set(np.unique(condition)) == {0, 255}
    assert {edges.min(), edges.max()} <= {15, 16, 47, 48}
    assert same(draw(*with_control, "--control-strength", "0"), plain)
    assert same(draw(*with_control), controlled[:1], within=1)
    first, second = (draw(*with_control, f"control_start={start}", f"control_end={end}")
                     for start, end in ((0, 0.5), (0.5, 1)))  # fmt: skip
    assert not same(first, plain, within=2)
    assert not same(first, second, within=2)
    assert not same(draw(*with_control, "control_guided=true"), controlled[:1], within=2)
    between = ("control_start=0.3", "control_end=0.45")  # where none of the four steps is
    assert same(draw(*with_control, *between), plain)
    assert not same(draw(*with_control, "control_ready=true"), controlled[:1], within=2)


@pytest.mark.slow
def test_several_controlnets_add_up_each_with_its_own_picture(draw, controlnet, picture):
    first, second = controlnet("CannyFilter", 0, CANNY), controlnet("CannyFilter", 1, CANNY)
    square, flat = picture("square.png"), picture("flat.png", inside=0)
    both = ["--controlnet", first, "--controlnet", second, "--control-image", square]
    together = draw(*both)
    assert [path.name for path in draw.files[-3:]] == ["condition_0.png", "condition_1.png", "grid.png"]
    alone = draw("--controlnet", first, "--control-image", square)
    assert same(draw(*both, "control_strength=[1, 0]"), alone)
    assert not same(together, alone, within=2)
    assert not same(draw(*both, "--control-image", flat), together, within=2)
    assert same(draw("--controlnet", second, "--controlnet", first, "--control-image", square), together, within=1)


@pytest.mark.slow
@pytest.mark.integration
def test_a_run_of_a_controlnet_is_its_base_under_its_control(draw, small_cascade, picture):
    settings = small_cascade | {
        "experiment_id": "edges", "controlnet_blocks": [1, 4], "controlnet_filter": "CannyFilter",
        "controlnet_filter_params": CANNY, "lr": 1.0, "diffusion_target": "v",
    }  # fmt: skip
    TrainControlNet(make_config(TrainControlNet.Config, settings)).run()
    run, square = Path(settings["checkpoint_path"]) / "edges", picture("square.png")
    of_run = draw("--run", run, "--control-image", square, base=False)
    given = draw("--controlnet", run, "--control-image", square, "diffusion_target=v")
    assert same(of_run, given)
    assert not same(of_run, draw("diffusion_target=v"), within=2)


def test_inpainting_paints_where_the_mask_says_and_keeps_the_rest(draw, controlnet, picture):
    file, square = controlnet("InpaintFilter"), picture("square.png", 64, 96, 200, 40)
    mask = picture("mask.png", 32, 48)
    given = ("--controlnet", file, "--control-image", square, "--control-mask", mask)
    (painted,), original = draw(*given, "size=[64, 96]", whole=True), np.array(Image.open(square)).astype(int)
    assert painted.shape == original.shape
    hole = np.zeros((64, 96), bool)
    hole[16:48, 24:72] = True
    seam = np.zeros_like(hole)
    seam[14:50, 22:74] = True
    assert np.abs(painted - original)[~seam].max() <= 1
    (free,) = draw(*given, "size=[64, 96]", "keep_unmasked=false", whole=True)
    assert np.abs(painted - free)[hole].max() == 0
    assert np.abs(free - original)[~seam].max() > 10
    condition = np.array(Image.open(next(path for path in draw.files if path.name == "condition_0.png")))
    assert (condition[hole] == 255).all()
    assert (condition[~hole] == original[~hole]).all()


@pytest.mark.slow
def test_outpainting_adds_margins_to_the_picture(draw, controlnet, picture):
    given = ("--controlnet", controlnet("InpaintFilter"), "--control-image", picture("flat.png", 64, 64, 90, 90))
    (wide,) = draw(*given, "control_margins=[0.5, 0, 0.5, 0]")
    assert wide.shape == (45, 91, 3)  # twice as wide as high, with the area of 64 x 64
    assert (np.abs(wide[:, 26:64] - 90) <= 1).all()
    assert np.abs(wide[:, :20] - 90).max() > 5
    (around,) = draw(*given, "control_margins=0.5", "size=[64, 64]")
    assert (np.abs(around[20:44, 20:44] - 90) <= 1).all()
    assert np.abs(around[:10] - 90).max() > 5


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mode"), [("SRFilter", None), ("SREffnetFilter", "simple")])
def test_super_resolution_draws_a_small_picture_at_the_size_asked_for(draw, controlnet, picture, name, mode):
    file = controlnet(name, params={"scale_factor": 0.5}, mode=mode)
    (drawn,) = draw("--controlnet", file, "--control-image", picture("small.png", 16, 32))
    assert drawn.shape == (45, 91, 3)
    condition = np.array(Image.open(next(path for path in draw.files if path.name == "condition_0.png")))
    assert condition.shape == (45, 91, 3)
    (other,) = draw("--controlnet", file, "--control-image", picture("other.png", 16, 32, 0, 255))
    assert not same([drawn], [other], within=2)


# ------------------------------------------------------------------ mistakes


@pytest.mark.integration
def test_a_mistake_with_a_lora_is_named(draw, lora_run, tmp_path, drawing_cascade):
    base = drawing_cascade["generator_checkpoint_path"]
    wider = load_file(lora_run / "lora.safetensors")
    wider = {name: torch.cat([t, t], dim=-1) if name.endswith("attn.lora.down") else t for name, t in wider.items()}
    save_file(wider, tmp_path / "wider.safetensors")
    write_lora(Lora({}, ["[dog]"], torch.zeros(1, 9), torch.zeros(1, 9)), tmp_path / "token.safetensors")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for words, *arguments in (
        ("there is no LoRA file nowhere", "lora=nowhere:0.5"),
        ("it is no LoRA, but whole weights of Stage C, which generator_checkpoint_path takes", f"lora={base}"),
        ("another network: down_blocks", f"lora={tmp_path}/wider.safetensors"),
        ("tokens [dog] are 9 wide, this text tower is 48", f"lora={tmp_path}/token.safetensors"),
        ("the token [dog] is in two of the LoRAs", f"lora={lora_run}", "--lora", lora_run),
        ("holds no controlnet.safetensors", f"controlnet={lora_run}", f"control_image={tmp_path / 'a.png'}"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            draw(*arguments)
        assert words in str(error.value)


def test_a_mistake_with_a_controlnet_is_named(draw, controlnet, picture, tmp_path, drawing_cascade):
    canny, inpaint, square = controlnet("CannyFilter"), controlnet("InpaintFilter"), picture("square.png")
    unsaid, wrong = tmp_path / "unsaid.safetensors", tmp_path / "wrong.safetensors"
    save_file(load_file(canny), unsaid)
    save_file(load_file(canny) | {"projections.0.2.weight": torch.zeros(8, 8, 1, 1)}, wrong, metadata_of(canny))
    with_canny, with_inpaint = ((f"controlnet={file}", f"control_image={square}") for file in (canny, inpaint))
    generator, text = drawing_cascade["generator_checkpoint_path"], tmp_path / "text.png"
    text.write_text("no picture")
    for words, *arguments in (
        ("control_image is for a ControlNet: give controlnet too", f"control_image={square}"),
        ("control_image has 0 values and controlnet 1", f"controlnet={canny}"),
        ("control_strength has 2 values and controlnet 1", *with_canny, "control_strength=[1, 2]"),
        ("control_start 0.5 is not before control_end 0.5", *with_canny, "control_start=0.5", "control_end=0.5"),
        ("control_image: nowhere.png does not exist", f"controlnet={canny}", "control_image=nowhere.png"),
        ("nowhere.safetensors does not exist", "controlnet=nowhere.safetensors", f"control_image={square}"),
        ("text.png cannot be read as a picture", f"controlnet={canny}", f"control_image={text}", "size=[64, 64]"),
        ("give controlnet_blocks as in its training config", f"controlnet={unsaid}", f"control_image={square}"),
        ("made for another network", f"controlnet={wrong}", f"control_image={square}"),
        ("holds no ControlNet", f"controlnet={generator}", f"control_image={square}"),
        ("there is no 'CanyFilter'", *with_canny, "controlnet_filter=CanyFilter"),
        ("resize: found 'big'", *with_canny, "controlnet_filter_params={resize: big}"),
        ("there is no block 9", *with_canny, "controlnet_blocks=[9]"),
        ("is for one ControlNet", *with_canny, "--controlnet", canny, "controlnet_filter=CannyFilter"),
        ("for ControlNets that inpaint; there is none here", *with_canny, f"control_mask={square}"),
        ("give one of the two", *with_inpaint),
        ("give one of the two", *with_inpaint, f"control_mask={square}", "control_margins=1"),
        ("how much to paint around the picture", *with_inpaint, "control_margins=[0, 0, -1, 0]"),
        ("is not the shape of its picture", *with_inpaint, f"control_mask={picture('long.png', 64, 128)}"),
        ("control_mask: nowhere.png does not exist", *with_inpaint, "control_mask=nowhere.png"),
        ("no picture shows the condition of InpaintFilter", *with_inpaint, "control_ready=true"),
        ("it needs at least 32 px", *with_inpaint, "control_margins=1", "size=[16, 64]"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            draw(*arguments)
        assert words in str(error.value), words


@pytest.mark.integration
def test_scripts_without_stage_c_have_no_use_for_a_lora(lora_run, monkeypatch):
    monkeypatch.setattr("sys.argv", ["reconstruct.py", "--run", str(lora_run), "--pictures", "x"])
    with pytest.raises(UserError, match="trained a lora, for which there is no use here"):
        reconstruct()
