"""Tokens of a LoRA through tools/export.py: nothing is overwritten, and what is written is read back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families.cascade.config import ModelSettings
from families.cascade.lora import open_loras
from families.cascade.lora_files import lora_files, write_lora
from families.cascade.lora_formats import Lora, LoraFileError
from families.common.weight_files import metadata_of
from tests.tools.test_export_steering import export, lora  # noqa: F401 (fixtures)
from warpcore.errors import UserError


@pytest.fixture
def mini_settings() -> ModelSettings:
    return ModelSettings(model_version="mini")


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def renamed(file: Path, *tokens: str) -> Path:
    """The file of a LoRA with other names of its two tokens."""
    about = metadata_of(file) | {"tokens": json.dumps(tokens)}
    save_file(load_file(file), file, metadata=about)
    return file


@pytest.mark.parametrize("form", ["lora-comfyui", "lora-kohya"])
def test_a_token_with_the_name_of_the_target_leaves_the_lora_whole(export, lora, tmp_path, form):  # noqa: F811
    file, out = lora("ours", tokens=True), tmp_path / "out"
    export(form, file, out / "dog.safetensors")
    assert files_in(out).keys() == {
        "dog.safetensors",
        "dog_embeddings/dog.safetensors",
        "dog_embeddings/w3.safetensors",
    }
    export("lora", out / "dog.safetensors", tmp_path / "back.safetensors", "model_version=mini")
    ours, back = load_file(file), load_file(tmp_path / "back.safetensors")
    assert ours.keys() == back.keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in ours.items() if not name.startswith("tokens."))
    torch.testing.assert_close(sum(back[f"tokens.{n}"] for n in ("initial", "delta")),
                               sum(ours[f"tokens.{n}"] for n in ("initial", "delta")))  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (("[heart]", "<heart>"), r"the tokens \[heart\] and <heart> would both be the embedding heart.safetensors"),
        (("[w3]", "w3</w>"), r"\[w3\] and w3</w> would both be .* our own format, lora, keeps"),
        (("[Dog]", "[dog]"), "would both be the embedding"),
        (("[a/b]", "[a_b]"), "would both be the embedding a_b.safetensors"),
    ],
)
@pytest.mark.parametrize("form", ["lora-comfyui", "lora-merged"])
def test_tokens_that_would_be_one_file_are_refused_before_anything_is_written(
    export, lora, drawing_cascade, tmp_path, form, tokens, said  # noqa: F811
):  # fmt: skip
    file, base = renamed(lora("ours", tokens=True), *tokens), drawing_cascade["generator_checkpoint_path"]
    before = files_in(tmp_path)
    with pytest.raises(UserError, match=said):
        export(form, file, tmp_path / "out" / "x.safetensors", f"generator_checkpoint_path={base}")
    assert files_in(tmp_path) == before
    export("lora-onetrainer", file, tmp_path / "out" / "x.safetensors")
    assert f"bundle_emb.{tokens[0]}.clip_g" in load_file(tmp_path / "out" / "x.safetensors")


def test_a_token_whose_name_is_no_file_name_gets_one_that_is(export, lora, tmp_path):  # noqa: F811
    file = renamed(lora("ours", tokens=True), "[../a:b]", '"</w>')
    export("lora-comfyui", file, tmp_path / "out" / "x.safetensors")
    folder = tmp_path / "out" / "x_embeddings"
    assert sorted(path.name for path in folder.iterdir()) == ["_.safetensors", "_a_b.safetensors"]
    assert metadata_of(folder / "_a_b.safetensors")["token"] == "[../a:b]"
    export("lora", tmp_path / "out" / "x.safetensors", tmp_path / "back.safetensors", "model_version=mini")
    assert json.loads(metadata_of(tmp_path / "back.safetensors")["tokens"]) == ["[../a:b]", '"</w>']


@pytest.mark.parametrize("there", ["x_embeddings/dog.safetensors", "x_embeddings/w3.safetensors", "x.safetensors"])
@pytest.mark.parametrize("form", ["lora-comfyui", "lora-merged"])
def test_no_file_that_exists_is_overwritten(export, lora, drawing_cascade, tmp_path, form, there):  # noqa: F811
    file, base = lora("ours", tokens=True), drawing_cascade["generator_checkpoint_path"]
    mine = tmp_path / "out" / there
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    before = files_in(tmp_path)
    with pytest.raises(UserError, match="is there already: name another file"):
        export(form, file, tmp_path / "out" / "x.safetensors", f"generator_checkpoint_path={base}")
    assert files_in(tmp_path) == before


def test_a_target_is_a_safetensors_file_and_no_link(export, lora, tmp_path):  # noqa: F811
    file, link = lora("ours"), tmp_path / "link.safetensors"
    with pytest.raises(UserError, match=r"out\.pt: lora-comfyui writes a safetensors file: name it .*out\.pt\.safete"):
        export("lora-comfyui", file, tmp_path / "out.pt")
    link.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(UserError, match="is there already"):
        export("lora", file, link)
    assert not (tmp_path / "elsewhere.safetensors").exists()


def test_tokens_of_onetrainer_are_bundled_and_come_back(export, lora, tmp_path):  # noqa: F811
    file, there = lora("ours", tokens=True), tmp_path / "x.safetensors"
    export("lora-onetrainer", file, there)
    ours, theirs = load_file(file), load_file(there)
    rows = ours["tokens.initial"] + ours["tokens.delta"]
    for name, row in zip(("[dog]", "w3"), rows, strict=True):
        assert torch.equal(theirs[f"bundle_emb.{name}.clip_g"], row[None])
    export("lora", there, tmp_path / "back.safetensors", "model_version=mini")
    assert json.loads(metadata_of(tmp_path / "back.safetensors")["tokens"]) == ["[dog]", "w3</w>"]
    assert torch.equal(load_file(tmp_path / "back.safetensors")["tokens.initial"], rows)


def test_a_lora_without_its_tokens_warns(export, lora, tmp_path, mini_settings, caplog):  # noqa: F811
    export("lora-comfyui", lora("ours", tokens=True), tmp_path / "x.safetensors")
    (opened,) = open_loras([f"{tmp_path}/x.safetensors"], mini_settings)
    assert opened[0].tokens == ["[dog]", "w3</w>"]
    assert not caplog.records
    (tmp_path / "x_embeddings").rename(tmp_path / "moved")
    open_loras([f"{tmp_path}/x.safetensors"], mini_settings)
    assert "tokens [dog], w3</w>, which are neither in its file nor in embeddings beside it" in caplog.text
    caplog.clear()
    *_, (tokens, _) = open_loras([f"{tmp_path}/x.safetensors", f"{tmp_path}/moved"], mini_settings)
    assert tokens.tokens == ["[dog]", "w3</w>"]
    assert not caplog.records
    assert "was trained with the tokens [dog], w3</w>" in export("lora-peft", tmp_path / "x.safetensors",
                                                                 tmp_path / "peft", "model_version=mini")  # fmt: skip
    export("lora", tmp_path / "x.safetensors", tmp_path / "again.safetensors", "model_version=mini")
    open_loras([f"{tmp_path}/again.safetensors"], mini_settings)
    assert "again.safetensors: The LoRA was trained with the tokens [dog]" in caplog.text


def test_embeddings_of_an_earlier_export_are_found_beside_the_lora(export, lora, tmp_path, mini_settings):  # noqa: F811
    export("lora-comfyui", lora("ours", tokens=True), tmp_path / "x.safetensors")
    for path in (tmp_path / "x_embeddings").iterdir():
        save_file(load_file(path), tmp_path / path.name)
        path.unlink()
    (opened,) = open_loras([f"{tmp_path}/x.safetensors"], mini_settings)
    assert opened[0].tokens == ["[dog]", "w3</w>"]
    assert not opened[0].missing_tokens


def test_tokens_beside_merged_weights_load_as_embeddings(export, lora, drawing_cascade, tmp_path, mini_settings):  # noqa: F811
    file, base = lora("ours", tokens=True), drawing_cascade["generator_checkpoint_path"]
    export("lora-merged", file, tmp_path / "m.safetensors", f"generator_checkpoint_path={base}", "strength=0.5")
    ours = load_file(file)
    (opened,) = open_loras([f"{tmp_path}/m_embeddings/dog.safetensors"], mini_settings)
    assert opened[0].tokens == ["[dog]"]
    row = ours["tokens.initial"][0] + 0.5 * ours["tokens.delta"][0]
    assert torch.equal(opened[0].token_initial + opened[0].token_delta, row[None])
    assert torch.equal(load_file(tmp_path / "m_embeddings" / "dog.safetensors")["clip_g"], row[None])


# ------------------------------------------------------------------ embeddings of others


def test_an_embedding_of_several_vectors_is_a_token_for_each(tmp_path, mini_settings, caplog):
    rows = torch.randn(3, 32)
    save_file({"clip_g": rows}, tmp_path / "my cat.safetensors")
    (opened,) = open_loras([f"{tmp_path}/my cat.safetensors"], mini_settings)
    assert opened[0].tokens == ["[my cat]", "[my cat.2]", "[my cat.3]"]
    assert torch.equal(opened[0].token_initial, rows)
    assert "is read where a prompt has [my cat][my cat.2][my cat.3]" in caplog.text


def test_embeddings_that_onetrainer_bundles_are_tokens(export, lora, tmp_path, mini_settings):  # noqa: F811
    export("lora-onetrainer", lora("ours"), tmp_path / "x.safetensors")
    rows = {"<cat>": torch.randn(1, 32), "a.b": torch.randn(2, 32)}
    bundled = {f"bundle_emb.{name}.clip_g": row for name, row in rows.items()}
    save_file(load_file(tmp_path / "x.safetensors") | bundled, tmp_path / "x.safetensors")
    (opened,) = open_loras([f"{tmp_path}/x.safetensors"], mini_settings)
    assert opened[0].adapters
    assert opened[0].tokens == ["<cat>", "[a.b]", "[a.b.2]"]
    assert torch.equal(opened[0].token_initial + opened[0].token_delta, torch.cat([*rows.values()]))


def test_what_an_embedding_holds_beyond_its_row_is_refused_by_name(tmp_path, mini_settings):
    for name in ("clip_l", "clip_g_out"):
        save_file({"clip_g": torch.zeros(1, 32), name: torch.zeros(1, 8)}, tmp_path / "x.safetensors")
        with pytest.raises(LoraFileError, match=f"it holds {name}, which Stable Cascade's text encoder has no place"):
            open_loras([f"{tmp_path}/x.safetensors"], mini_settings)


def test_files_are_planned_without_writing(tmp_path):
    tokens = Lora({}).with_tokens(["[dog]"], torch.zeros(1, 4), torch.ones(1, 4))
    assert list(lora_files(tokens, tmp_path / "x.safetensors")) == [tmp_path / "x.safetensors"]
    assert not list(tmp_path.iterdir())
    write_lora(tokens, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").exists()
