"""Tools write over nothing, and nothing twice."""

import os

import pytest

from warpcore.errors import UserError
from warpcore.outputs import check_folder, check_new, free_folder


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


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_may_not_be_written_to_is_told_before_the_work(tmp_path):
    (tmp_path / "folder").mkdir(mode=0o500)
    with pytest.raises(UserError, match=r"folder may not be written to: change its permissions, or name another"):
        check_new([tmp_path / "folder" / "new" / "a"], "name another")


def test_a_read_only_disk_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))
    check_new([tmp_path.parent / "a"], "name another")
    with pytest.raises(UserError, match="may not be written to"):
        check_new([tmp_path / "new" / "a"], "name another")


def test_files_may_be_written_over_where_that_is_asked_for_but_no_folder_is(tmp_path):
    (tmp_path / "file").write_text("")
    check_new([tmp_path / "file"], "name another", overwrite=True)
    for name, words in (("", "is there already"), ("file/a", "file is a file")):
        with pytest.raises(UserError, match=words):
            check_new([tmp_path / name], "name another", overwrite=True)


def test_a_folder_to_write_to_may_be_missing_but_is_no_file_and_in_none(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("", "new", "new/below"):
        check_folder(tmp_path / name, "the tars")
    for name in ("file", "file/below"):
        with pytest.raises(UserError, match="file is a file; name a folder to write the tars to"):
            check_folder(tmp_path / name, "the tars")


def test_the_first_free_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(free_folder("pictures")) == "pictures"
    for name in ("pictures", "pictures_2"):
        (tmp_path / name).mkdir()
    assert str(free_folder("pictures")) == "pictures"
    (tmp_path / "pictures/a").write_text("")
    (tmp_path / "pictures_2/a").write_text("")
    assert str(free_folder("pictures")) == "pictures_3"
