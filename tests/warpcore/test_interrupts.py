"""Ctrl-C: what a script says when it is stopped at once."""

import pytest

from warpcore.errors import run_script


def test_ctrl_c_ends_a_script_in_one_line_and_with_the_status_of_shells(capfd):
    def main():
        raise KeyboardInterrupt

    def tell(message):
        pytest.fail("waits for other processes")

    with pytest.raises(SystemExit) as ended:
        run_script(main, tell)
    assert ended.value.code == 130
    assert capfd.readouterr().err == "stopped by Ctrl-C\n"
