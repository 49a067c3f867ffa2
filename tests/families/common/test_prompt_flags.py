"""Flags that other programs read from prompts are refused by name, wherever prompts are given."""

import pytest

from families.cascade.config import StageCConfig
from families.cascade.text_to_image import CascadeTextToImageConfig
from families.common.prompt_flags import FLAGS, OTHER_FLAGS, without_flags
from families.common.text_to_image import TextToImageConfig
from families.stable_diffusion.config import SdConfig
from families.stable_diffusion.text_to_image import SdTextToImageConfig
from warpcore.config import make_config
from warpcore.errors import UserError

KOHYA = "a dog, blue --n a cat, red --w 192 --h 256 --d 5 --l 7.5 --s 20 --ss euler_a"
MESSAGE = "--n, --w, --h, --d, --l, --s, --ss would be drawn as words"


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        (StageCConfig, "sample_prompts"),
        (SdConfig, "sample_prompts"),
        (CascadeTextToImageConfig, "prompts"),
        (SdTextToImageConfig, "prompts"),
        (SdTextToImageConfig, "negative_prompts"),
    ],
)
def test_flags_in_a_list_of_prompts_are_refused_by_name(kind, key):
    with pytest.raises(UserError, match=f"{key}: found .*{MESSAGE}.* the keys negative_prompt, size, seeds, guidance"):
        make_config(kind, {key: ["a dog", KOHYA]})


def test_flags_in_a_prompt_file_are_refused_by_name(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(f"# drawn\na dog\n{KOHYA}\n")
    config = make_config(TextToImageConfig, {"prompt_file": file})
    with pytest.raises(UserError, match=f"prompt_file: .*prompts.txt, 'a dog, blue .*{MESSAGE}"):
        config.all_prompts  # noqa: B018


@pytest.mark.parametrize("flag", [*(flag for flags in FLAGS.values() for flag in flags), *OTHER_FLAGS, "W"])
def test_every_flag_is_known(flag):
    with pytest.raises(ValueError, match=f"^--{flag} would be drawn"):
        without_flags(f"a dog --{flag} 5")


def test_dashes_that_are_no_flag_are_drawn():
    for prompt in ("a dog -- brown", "a--w dog", "a dog --", "a well-known dog - d 5", "--whiskers", "wide --- w"):
        assert without_flags(prompt) == prompt
