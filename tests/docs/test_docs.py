"""Every command, key, file and link that the README and the pages of docs/ show is there."""

import re
import shutil
from functools import cache

import pytest
import yaml

from families.common import weight_source
from families.common.hub import DownloadError
from families.registry import families
from tests.docs.commands import REQUIRED, check, commands
from tests.docs.pages import GUIDE, PAGES, ROOT, anchors, blocks, guide_files, inline_code, links, prose
from tools.config_reference import scripts, settings_of
from warpcore.config import load_config
from warpcore.diffusion.samplers import DIT_SAMPLERS
from warpcore.errors import UserError

README_LINES = 250
FOLDERS = r"(?:train|inference|tools|families|warpcore|modules|configs|models|benchmarks|tests|docs)"
OF_OTHER_PROGRAMS = {
    "models/loras", "models/embeddings", "models/download_models.sh", "train/example_train.sh", "gradio_app/app.py",
    "inference/text_to_image.ipynb", "inference/controlnet.ipynb", "inference/lora.ipynb",
    "inference/reconstruct_images.ipynb", "weights_only", "checkpoint_extension", "dist_file_subfolder",
}  # fmt: skip
"""Files and keys that the pages name and that are ComfyUI's, PyTorch's, or the public implementation's."""
OTHERS = [page for page in PAGES if page != GUIDE]
shown = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def _without_a_hub(monkeypatch):
    def no_hub(repository, folder=""):
        raise DownloadError(f"{repository} is not asked for in tests")

    monkeypatch.setattr(weight_source, "list_files", no_hub)


@cache
def known_keys() -> set[str]:
    kinds = [kind for script in scripts() for kind in settings_of(script)]
    kinds += [form.keys() for family in families() for form in family.formats if form.keys]
    return {"base", *(key for kind in kinds for key in kind.model_fields)}


@cache
def known_words() -> set[str]:
    """Every name in the code."""
    paths = [path for folder in re.findall(r"\w+", FOLDERS[3:-1]) for path in (ROOT / folder).rglob("*.py")]
    texts = [path.read_text(encoding="utf-8") for path in [*paths, ROOT / "Makefile", ROOT / "example_train.sh"]]
    return set(re.findall(r"\w+", "\n".join(texts)))


@pytest.mark.parametrize("block", blocks("sh", pages=OTHERS), ids=str)
def test_the_commands_of_a_block_could_start(block, tmp_path):
    found = list(commands(block.text))
    assert found
    for words in found:
        check(words, tmp_path)


@shown
def test_the_commands_in_a_sentence_or_table_could_start(page, tmp_path):
    for code in inline_code(page):
        if re.match(r"(python3|make|sbatch) ", code) or (code.startswith("torchrun ") and ".py" in code):
            for words in commands(code):
                check(words, tmp_path)
        elif match := re.match(rf"({FOLDERS}/[\w/]+\.py) (.*)", code):
            text = (ROOT / match.group(1)).read_text(encoding="utf-8")
            assert all(option in text for option in re.findall(r"--[\w-]+", match.group(2))), code


@pytest.mark.parametrize(
    "command",
    [
        "make readme",
        "aws-of-yesterday s3 ls",
        "python3 train/train_d.py CONFIG.yaml",
        "python3 train/train_c.py configs/training/finetune_c_2b.yaml",
        "python3 train/train_c.py CONFIG.yaml module_filters=.attn",
        "torchrun --processes 8 train/train_c.py CONFIG.yaml",
        "sbatch --nodes=4 example_train.sh train/train_c.py CONFIG.yaml lr=fast",
        "python3 inference/text_to_image.py promts=a",
        "python3 inference/text_to_image.py steps=few",
        "python3 tools/build_dataset.py pictures data/shards --shards 4",
        "python3 tools/memory.py train/train_c.py CONFIG.yaml --gpu-memory 80 rank=4",
        "python3 tools/export.py lora-of-another runs/a b.safetensors",
        "python3 tools/export.py single-file runs/a b.safetensors export_dtyp=float16",
        "python3 tools/export.py single-file runs/a b.safetensors export_dtype=half",
        "python3 tools/export.py lora-comfyui runs/a b.safetensors export_dtype=float16",
    ],
)
def test_a_command_that_could_not_start_is_found(command, tmp_path):
    (words,) = commands(command)
    with pytest.raises((AssertionError, UserError, SystemExit, pytest.fail.Exception)):
        check(words, tmp_path)


@pytest.mark.parametrize("block", blocks("yaml", pages=OTHERS), ids=str)
def test_a_config_loads_in_the_script_that_it_is_for(block, tmp_path):
    kind = settings_of(block.note or "train/train_c.py")[0]
    keys = yaml.safe_load(block.text)
    required = {key: value for key, value in REQUIRED.items() if key in kind.model_fields and key not in keys}
    shutil.copytree(ROOT / "configs" / "training", tmp_path, dirs_exist_ok=True)
    (tmp_path / "shown.yaml").write_text(block.text + ("" if "base" in keys else yaml.safe_dump(required)))
    load_config(kind, [str(tmp_path / "shown.yaml")])


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_compiles(block):
    compile(block.text, str(block), "exec")


@shown
def test_keys_and_names_are_those_of_the_code(page):
    for code in inline_code(page):
        if match := re.match(r"([a-z][a-z0-9_]*)[\w.]*(?:: |=)\S", code):
            assert match.group(1) in known_keys() | OF_OTHER_PROGRAMS, code
        elif re.fullmatch(r"[a-z]+(_[a-z0-9]+)+", code):
            assert code in known_words() | known_keys() | OF_OTHER_PROGRAMS, code


@shown
def test_files_exist(page):
    for code in inline_code(page):
        if re.fullmatch(rf"{FOLDERS}/[\w./*-]*", code) and code not in OF_OTHER_PROGRAMS:
            in_guide = page == GUIDE and any(path.startswith(code) for path in guide_files())
            assert in_guide or list(ROOT.glob(code.rstrip("/"))), f"{code} does not exist"


@shown
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        if not re.match(r"\w+://", link):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@shown
def test_code_stands_in_fenced_blocks(page):
    """Other blocks would escape these tests."""
    assert not re.findall(r"^ {4,}\S.*$", prose(page), re.MULTILINE)
    assert {block.language for block in blocks(pages=[page])} <= {"sh", "text", "yaml", "python"}


def test_every_sampler_is_listed():
    rows = re.findall(r"^\| `(\S+)` \|", (ROOT / "docs" / "samplers.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == list(DIT_SAMPLERS)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_every_page_can_be_found_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in links(ROOT / "README.md")}
    assert set((ROOT / "docs").glob("*.md")) <= linked
