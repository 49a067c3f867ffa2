"""Files of prompts and of classes hold anything: what is drawn, or one clear error that names the file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from families.common.class_to_image import ClassToImageConfig
from families.common.classes import class_number
from families.common.text_to_image import TextToImageConfig
from tests.bounds import fuzz
from warpcore.config import make_config
from warpcore.errors import UserError

LINES = ["3", " 4 ", "# no", "", "-1", "9" * 30, "³", "red star", "a --ar 3", "\x00", "\r", "\u2028"]
CONTENT = st.one_of(
    st.binary(max_size=80),
    st.text(max_size=80).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from(LINES)).map(lambda lines: "\n".join(lines).encode()),
    st.sampled_from([b"", b"\xff\xfe3\x00", b"\xef\xbb\xbf3\n4", b"3\r\n4\r", b"#\n"]),
)  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("lines") / "lines.txt"


@fuzz(100)
@given(content=CONTENT)
def test_prompt_files_give_prompts_or_one_error(file, content):
    file.write_bytes(content)
    prompts, problem = outcome(lambda: make_config(TextToImageConfig, {"prompt_file": str(file)}).all_prompts)
    assert (file.name in problem) != bool(prompts)
    assert all(prompt.strip() and not prompt.startswith("#") for prompt in prompts)


@fuzz(100)
@given(content=CONTENT)
def test_class_files_give_classes_or_one_error(file, content):
    file.write_bytes(content)
    classes, problem = outcome(lambda: make_config(ClassToImageConfig, {"class_file": str(file)}).all_classes)
    assert (file.name in problem) != bool(classes)
    for one in classes:
        number, problem = outcome(lambda one=one: [class_number(one, 5, ["red star", "b", "c", "d", "e"])])
        assert "class" in problem or 0 <= number[0] < 5


def outcome(read) -> tuple[list, str]:
    """What is read, and the error message."""
    try:
        return read(), ""
    except (UserError, ValueError) as error:
        return [], str(error)
