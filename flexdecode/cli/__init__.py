"""The command line: `flexdecode`, or `python -m flexdecode`.

In: the words of a command line.
Out: text, files, and an exit status: 2 for a user's mistake. It calls the public functions of the library.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the words after the name of the program; by default those of this process.

    Returns:
        The exit status: that of the command, 2 for a user's mistake, 130 after Ctrl-C.
    """
    if not all(importlib.util.find_spec(name) for name in ("typer", "rich")):
        print("flexdecode: the command line needs typer and rich: pip install 'flexdecode[cli]'", file=sys.stderr)
        return 2
    from .app import run

    try:
        return run(None if arguments is None else list(arguments))
    except KeyboardInterrupt:
        return 130
