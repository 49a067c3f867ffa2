"""LoRAs and ControlNets through tools/export.py: every format there and back, and what cannot be."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from families.cascade.config import ModelSettings
from families.cascade.controlnet import ControlNetSettings, file_metadata, settings_of_file
from families.cascade.lora import outline
from families.cascade.lora_files import write_lora
from families.common.lora_training import lora_of, train_tokens
from families.common.weight_files import metadata_of
from modules.clip import text_tower
from modules.controlnet import ControlNet
from modules.lora import LoraSettings, add_adapters
from tests.modules.test_lora import randomised
from tools.export import main
from warpcore.errors import UserError

TOKENS = [["[dog]", "^picture</w>"], ["^w3", None]]


@pytest.fixture
def export(monkeypatch, capsys):
    def export(*arguments: object) -> str:
        monkeypatch.setattr("sys.argv", ["export.py", *map(str, arguments)])
        main()
        return capsys.readouterr().out

    return export


@pytest.fixture
def lora(drawing_cascade, tmp_path):
    """Makes our file of a LoRA of the small cascade, with or without tokens."""

    def lora(name: str, tokens: bool = False, filters: tuple[str, ...] = (".attn",), **settings):
        network = outline(ModelSettings(model_version="mini")).to_empty(device="cpu")
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        add_adapters(network, filters, LoraSettings(**{"rank": 4, "alpha": 4} | settings))
        rows = train_tokens(text_tower(path=tmp_path / "text.safetensors"), TOKENS) if tokens else None
        if rows:
            rows.delta.data.normal_(generator=torch.Generator().manual_seed(1))
        file = tmp_path / f"{name}.safetensors"
        write_lora(lora_of(randomised(network, 0), rows), file, about={"model_version": "mini"})
        return file

    return lora


def assert_same(one, other) -> None:
    ours, theirs = load_file(one), load_file(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.bits
@pytest.mark.parametrize("form", ["lora", "lora-comfyui", "lora-peft", "lora-reference"])
def test_a_lora_comes_back_from_every_format_with_the_same_bits(export, lora, tmp_path, form):
    file, there, back = lora("ours"), tmp_path / "there", tmp_path / "back.safetensors"
    there = there if form == "lora-peft" else there.with_suffix(".safetensors")
    assert f"{there}" in export(form, file, there)
    export("lora", there, back, "--model_version", "mini")
    assert_same(file, back)
    about = metadata_of(back)
    assert (about["model_version"], json.loads(about["rank"]), json.loads(about["alpha"])) == ("mini", 4, 4)


def test_tokens_go_where_there_is_a_place_for_them(export, lora, tmp_path):
    file = lora("ours", tokens=True)
    numbered, back = tmp_path / "numbered.safetensors", tmp_path / "back.safetensors"
    export("lora-reference", file, numbered)
    with pytest.raises(UserError, match=r"trains tokens .* without naming them: give the train_tokens"):
        export("lora", numbered, back, "model_version=mini")
    export("lora", numbered, back, "model_version=mini", f"train_tokens={json.dumps(TOKENS)}")
    assert_same(file, back)
    assert json.loads(metadata_of(back)["tokens"]) == ["[dog]", "w3</w>"]
    assert "dog.safetensors" in export("lora-comfyui", file, tmp_path / "c" / "comfyui.safetensors")
    assert "tokens [dog], w3</w> stay behind" in export("lora-peft", file, tmp_path / "peft")


def test_merged_weights_keep_precision_and_target_of_the_base(export, lora, drawing_cascade, tmp_path):
    base = drawing_cascade["generator_checkpoint_path"]
    half = {name: tensor.bfloat16() for name, tensor in load_file(base).items()}
    save_file(half, tmp_path / "half.safetensors", metadata={"diffusion_target": "v"})
    merged = tmp_path / "merged.safetensors"
    export("lora-merged", lora("ours"), merged, f"generator_checkpoint_path={tmp_path}/half.safetensors")
    assert metadata_of(merged)["diffusion_target"] == "v"
    after = load_file(merged)
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, half[name])}
    assert changed == {name for name in half if ".attn." in name and name.endswith("weight")}
    with pytest.raises(UserError, match="needs the weights that the LoRA was trained on"):
        export("lora-merged", tmp_path / "ours.safetensors", tmp_path / "more.safetensors")


@pytest.fixture
def published_controlnet(tmp_path):
    """A file as the reference implementation writes it, of the smallest kind that it knows, and its settings."""
    blocks = [0, 4, 8, 12, 51, 55, 59, 63]
    with torch.device("meta"):
        shapes = ControlNet(512, proj_blocks=blocks, bottleneck_mode="simple").half().state_dict()
    state = {name: torch.full(t.shape, i, dtype=t.dtype) for i, (name, t) in enumerate(shapes.items())}
    save_file(state, tmp_path / "published.safetensors")
    made = ControlNetSettings(controlnet_blocks=blocks, controlnet_filter="IdentityFilter",
                              controlnet_bottleneck_mode="simple", official_stem=True)  # fmt: skip
    return tmp_path / "published.safetensors", made


def test_a_controlnet_goes_into_the_reference_layout_and_back(export, published_controlnet, tmp_path):
    source, made = published_controlnet
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    export("controlnet", source, ours, "controlnet_filter_params={models_path: faces}")
    assert_same(ours, source)
    assert settings_of_file(ours) == made.model_copy(update={"controlnet_filter_params": {"models_path": "faces"}})
    export("controlnet-reference", ours, theirs)
    assert_same(theirs, source)
    assert metadata_of(theirs) == {"format": "pt"}
    assert settings_of_file(theirs) == made


def test_formats_say_what_their_reader_does_with_dora(export, lora, tmp_path):
    rows, out = lora("rows", dora=True), tmp_path / "out"
    comfyui = export("lora-comfyui", rows, out / "comfyui.safetensors")
    assert "ComfyUI draws DoRA wrongly" in comfyui
    assert "use lora-merged" in comfyui
    assert "Decompose Output Axis" in export("lora-onetrainer", rows, out / "onetrainer.safetensors")
    assert "DoRA" not in export("lora", rows, out / "ours.safetensors")
    assert "DoRA" not in export("lora-comfyui", lora("plain"), out / "plain.safetensors")


# ComfyUI's loader gives each of the projections to one of these blocks of the 3.6B, in this order, and knows only
# networks with the tensor backbone.0.0.weight (effnet) or backbone.10.blocks.0.weight (large).
COMFYUI_BLOCKS = [0, 4, 8, 12, 51, 55, 59, 63]


@pytest.mark.parametrize(
    ("blocks", "mode", "width", "words"),
    [
        (COMFYUI_BLOCKS, "effnet", 2048, None),
        (COMFYUI_BLOCKS, None, 2048, None),
        (COMFYUI_BLOCKS, "large", 2048, None),
        (
            [0, 8, 16, 24],
            "effnet",
            2048,
            "it controls the blocks [0, 4, 8, 12, 51, 55, 59, 63] whatever the file says",
        ),
        (COMFYUI_BLOCKS[::-1], "effnet", 2048, "and this one is for [63, 59, 55, 51, 12, 8, 4, 0]"),
        (COMFYUI_BLOCKS, "simple", 2048, "it knows the bottlenecks effnet and large only, not simple"),
        (COMFYUI_BLOCKS, "effnet", 1536, "its blocks are 2048 wide, not 1536"),
    ],
)
def test_an_exported_controlnet_says_where_comfyui_would_draw_something_else(
    export, tmp_path, blocks, mode, width, words
):
    said = {"controlnet_blocks": blocks, "controlnet_bottleneck_mode": mode, "official_stem": True}
    about = file_metadata(ControlNetSettings(controlnet_filter="CannyFilter", **said))
    shapes = {"projections.0.0.weight": (8, 8, 1, 1), "projections.0.2.weight": (width, 8, 1, 1)}
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "c.safetensors", metadata=about)
    formats = ["controlnet"] + ["controlnet-reference"] * (width == 2048)
    for form in formats:
        told = export(form, tmp_path / "c.safetensors", tmp_path / f"{form}.safetensors")
        assert (words in told) if words else ("ComfyUI" not in told)


def test_a_mistake_is_named(export, lora, tmp_path, drawing_cascade):
    attention, base = lora("ours"), drawing_cascade["generator_checkpoint_path"]
    apart, dora = lora("apart", filters=(r"attn\.q$",), split_qkv=True), lora("dora", dora=True)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model_version: mini\n")
    mini = ControlNetSettings(controlnet_blocks=[0], controlnet_filter="CannyFilter")
    tensors = {"projections.0.0.weight": torch.zeros(8, 8, 1, 1), "projections.0.2.weight": torch.zeros(64, 8, 1, 1)}
    narrow = tmp_path / "mini.safetensors"
    save_file(tensors, narrow, metadata=file_metadata(mini))
    new = tmp_path / "new.safetensors"
    for words, *arguments in (
        ("is there already: name another file", "lora", attention, apart),
        ("it is no LoRA", "lora", base, new, "model_version=mini"),
        ("another network: down_blocks", "lora", attention, new, "model_version=1B"),
        ("holds no lora.safetensors", "lora", run, new),
        ("adapted with DoRA, which the reference's file cannot express", "lora-reference", dora, new),
        ("the reference's file knows whole layers only", "lora-reference", apart, new),
        ("one LoRA at a time, not 2", "lora", attention, new, "--lora", apart),
        ("holds no ControlNet", "controlnet", base, new),
        ("reference implementation controls Stage C 3.6B only", "controlnet-reference", narrow, new),
        ("unknown key; did you mean controlnet_blocks?", "controlnet", base, new, "controlnet_block=[1]"),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            export(*arguments)
        assert words in str(error.value), words
    assert not new.exists()
