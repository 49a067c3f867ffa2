"""Tools write over nothing, and nothing twice."""

import pytest

from warpcore.errors import UserError
from warpcore.outputs import check_new, free_folder


def test_what_is_there_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    check_new([tmp_path / "a", tmp_path / "new/b"], "name another")
    for files, words in (
        (["a", "file"], "file is there already: name another"),
        (["link"], "link is there already"),
        (["a", "b", "a"], "a would be written twice"),
        (["new/a", "new/A"], "new/A would be written twice"),
        (["file/a"], "file/a can't be written: .*file is a file"),
    ):
        with pytest.raises(UserError, match=words):
            check_new([tmp_path / name for name in files], "name another")


def test_the_first_free_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(free_folder("pictures")) == "pictures"
    for name in ("pictures", "pictures_2"):
        (tmp_path / name).mkdir()
    assert str(free_folder("pictures")) == "pictures"
    (tmp_path / "pictures/a").write_text("")
    (tmp_path / "pictures_2/a").write_text("")
    assert str(free_folder("pictures")) == "pictures_3"
