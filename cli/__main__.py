"""The console script. Ctrl-C is a sentence from the first moment on: it takes a while to import the commands."""

from __future__ import annotations

import sys

_INTERRUPTED = 130


def main() -> None:
    try:
        from cli.main import main as run

        run()
    except KeyboardInterrupt:  # later on each command tells it by itself
        sys.stderr.write("shadowft: stopped. Nothing was written.\n")
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
