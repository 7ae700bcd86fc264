"""docs/operations.md lists what is supported; its tables are made of the op table and the registered handlers.

`python tests/docs/test_operations.py` writes the tables anew.
"""

from functools import reduce
from pathlib import Path

import torch

from flexdecode.frontend import torch_functions  # registers every handler
from flexdecode.frontend.handlers import HANDLERS, ROWS, group_of, spelled
from flexdecode.frontend.ops import GROUPS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
BEGIN, END = "<!-- tables: made by tests/docs/test_operations.py -->\n", "<!-- end of the tables -->\n"
SPACES = {"`torch.`": torch, "method": torch.Tensor, "`torch.nn.functional.`": torch.nn.functional,
          "`torch.special.`": torch.special}  # fmt: skip


ELEMENTWISE = {*GROUPS.values(), "Activation functions"}  # whose names in torch.ops.aten are tested


def in_aten(name):
    return hasattr(torch.ops.aten, name) or hasattr(torch.ops.aten, f"special_{name}")


def has(space, name):
    *modules, short = name.split(".")
    return hasattr(reduce(lambda found, module: getattr(found, module, None), modules, space), short)


def groups():
    """By heading: the names of each function, that of its row first."""
    found = {}
    for name in (*ROWS, *HANDLERS):
        if group_of(name) is not None and spelled(name) and not name.startswith("_"):
            names = found.setdefault(group_of(name), {}).setdefault(ROWS.get(name, HANDLERS.get(name)), [])
            name = name.replace("linalg_", "linalg.")
            if name not in names:
                names.append(name)
    return {group: sorted(functions.values()) for group, functions in found.items()}


def tables():
    text = ""
    for group, functions in groups().items():
        spaces = [*SPACES, "`torch.ops.aten.`"] if group in ELEMENTWISE else [*SPACES]
        text += f"\n## {group}\n\n| | {' | '.join(spaces)} |\n|---|{'---|' * len(spaces)}\n"
        for names in functions:
            columns = [[name for name in names if has(space, name)] for space in SPACES.values()]
            columns += [[name for name in names if in_aten(name)]] if group in ELEMENTWISE else []
            marks = ["" if not column else "✓" if column == names else ", ".join(column) for column in columns]
            text += f"| {', '.join(f'`{name}`' for name in names)} | {' | '.join(marks)} |\n"
    return f"{text}\n"


def written(page):
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + tables() + END + after


def test_the_page_lists_what_is_supported():
    text = PAGE.read_text()
    assert BEGIN in text and END in text
    assert written(text) == text, "run `python tests/docs/test_operations.py` and look at the difference"


def test_every_name_has_a_heading():
    assert torch_functions.HANDLERS is HANDLERS
    assert "Other" not in groups()


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
