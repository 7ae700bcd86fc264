"""Random valid calls against the reference: `python -m tests.fuzz SEED` prints and replays one."""

import sys
from pathlib import Path

# `python -m tests.fuzz` is started at the top of the repository; pytest has this folder on its path already.
if str(Path(__file__).parents[1]) not in sys.path:
    sys.path.append(str(Path(__file__).parents[1]))
