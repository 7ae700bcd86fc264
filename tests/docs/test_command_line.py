"""Runs the ```sh blocks of docs/command-line.md, and compares what they print with the text block after each.

`python tests/docs/test_command_line.py` writes the text blocks anew: read the difference.
"""

import contextlib
import io
import os
import re
import shlex
import tempfile
from pathlib import Path

import pytest

from flexdecode.cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "command-line.md"
MODULE = "(a file of the store)"  # what the page shows in place of the path of a generated module
BLOCK = re.compile(r"^```sh\n(?P<code>.*?)^```\n(?:```text\n(?P<text>.*?)^```\n)?", re.MULTILINE | re.DOTALL)


def commands(block):
    """The command lines of a block, without those of other programs."""
    lines = [shlex.split(line) for line in block["code"].splitlines()]
    return [words[1:] for words in lines if words[0] == "flexdecode"]


def outcome(block):
    """What a block prints, with a name in place of paths, and its last exit status."""
    printed, status = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        for words in commands(block):
            status = main(words)
    return re.sub(r"\S*/modules/\w+\.py", MODULE, printed.getvalue()), status


@contextlib.contextmanager
def reader():
    """What a reader has: an empty store, and a folder with `my_mods.py`, which is the Python block of the page."""
    code = re.search(r"^```python\n(.*?)^```\n", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    before, place = os.environ.get("FLEXDECODE_CACHE_DIR"), os.getcwd()
    with tempfile.TemporaryDirectory(prefix="flexdecode-docs-") as folder:
        (Path(folder) / "my_mods.py").write_text(code)
        os.chdir(folder)
        os.environ["FLEXDECODE_CACHE_DIR"] = os.path.join(folder, "store")
        try:
            yield
        finally:
            os.chdir(place)
            os.environ.pop("FLEXDECODE_CACHE_DIR")
            if before is not None:
                os.environ["FLEXDECODE_CACHE_DIR"] = before


BLOCKS = [block for block in BLOCK.finditer(PAGE.read_text()) if commands(block)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block["code"].split(" --")[0].strip())
def test_command_lines_do_what_the_page_says(block, monkeypatch):
    if "--png" in block["code"] or "--plot" in block["code"]:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)  # `bench` sets it for its process
    with reader():
        printed, status = outcome(block)
    if block["text"] is None:
        assert status == 0, printed
    else:
        assert printed == block["text"]
        assert status == (2 if printed.startswith("flexdecode: ") else 0)


def test_the_page_has_every_command():
    from flexdecode.cli import app

    text = PAGE.read_text()
    for command in app.app.registered_commands:
        assert f"\n## {command.name}\n" in text
    assert {words[1] for block in BLOCKS for words in commands(block) if words[0] == "cache"} == {
        "list",
        "size",
        "clear",
    }


if __name__ == "__main__":

    def written(block):
        text = block[0]
        if block["text"] is not None:
            with reader():
                text = f"```sh\n{block['code']}```\n```text\n{outcome(block)[0]}```\n"
        return text

    PAGE.write_text(BLOCK.sub(written, PAGE.read_text()))
