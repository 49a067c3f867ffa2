"""The engine (see `warpcore.core`). Every script and tool imports this before any module that Windows lacks."""

import sys

if sys.platform == "win32":
    print(
        "error: Windows lacks the file locks and signals that Warpcore needs. It runs on Linux and macOS, and on "
        "Windows inside WSL2: run `wsl --install`, install Warpcore there, and start the same command",
        file=sys.stderr,
    )
    raise SystemExit(2)
