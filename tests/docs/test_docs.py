"""Executes the code blocks of README.md and docs/*.md, and checks that links inside the project resolve.

The ```python blocks of a page run in order, in one namespace, each under the file name `example.py`. A comment on the
line before a fence says more:

    <!-- gpu -->     a python block that needs CUDA: it runs only in the tests marked `gpu`
    <!-- output -->  a text block: what the python block before it prints
    <!-- error -->   a text block: the type and message of the exception that the python block before it raises

`python tests/docs/test_docs.py` writes the text blocks anew (gpu blocks where there is a GPU): read the difference.
"""

import contextlib
import importlib
import io
import linecache
import os
import re
import sys
import tempfile
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {"transformers.md": "transformers.masking_utils"}  # pages that need more than the tests do otherwise
LONGEST = 100  # characters of a line of Python: in a window of 1440 px 108 fit, beside a scroll bar
FILE_NAME = "example.py"  # what error messages in the pages show in place of a path


# --- Pages ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block; `start` and `end` are the lines of its text, counted from 0, `mark` is the comment before it."""

    language: str
    mark: str
    start: int
    end: int
    text: str


def read_blocks(page: Path) -> list[Block]:
    blocks, lines = [], page.read_text().splitlines()
    opening = None
    for number, line in enumerate(lines):
        if opening is None and line.startswith("```"):
            opening = number
        elif opening is not None and line.startswith("```"):
            mark = re.fullmatch(r"<!-- (\w+) -->", lines[opening - 1].strip()) if opening else None
            text = "\n".join(lines[opening + 1 : number])
            blocks.append(Block(lines[opening][3:].strip(), mark[1] if mark else "", opening + 1, number, text))
            opening = None
    assert opening is None, f"{page.name}:{opening + 1}: the block is not closed"
    return blocks


@dataclass(frozen=True)
class Step:
    """A python block with the text blocks that say what it prints and raises."""

    code: Block
    output: Block | None
    error: Block | None


def read_steps(page: Path) -> list[Step]:
    steps: list[Step] = []
    for block in read_blocks(page):
        if block.language == "python":
            assert block.mark in ("", "gpu"), f"{page.name}:{block.start}: unknown mark {block.mark!r}"
            steps.append(Step(block, None, None))
        elif block.mark:
            assert steps and block.mark in ("output", "error"), (
                f"{page.name}:{block.start}: unknown mark {block.mark!r}"
            )
            assert getattr(steps[-1], block.mark) is None, f"{page.name}:{block.start}: a second {block.mark} block"
            steps[-1] = Step(**{**vars(steps[-1]), block.mark: block})
    return steps


def run_step(step: Step, namespace: dict) -> tuple[str, BaseException | None]:
    """Runs one python block; returns what it prints, without trailing space, and what it raises."""
    linecache.cache[FILE_NAME] = (len(step.code.text), None, step.code.text.splitlines(keepends=True), FILE_NAME)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            exec(compile(step.code.text + "\n", FILE_NAME, "exec"), namespace)
    except Exception as error:
        return _clean(printed.getvalue()), error
    return _clean(printed.getvalue()), None


def _clean(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.rstrip().splitlines())


def error_text(error: BaseException) -> str:
    return _clean(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def fresh_process():
    """What a reader has who runs a page in a new process: a module, empty counters, and an empty kernel cache.

    Yields the namespace of the module, which can be imported (FlexAttention imports the module of a mod).
    """
    import flexdecode
    from flexdecode.ahead import loaded

    before = os.environ.get("FLEXDECODE_CACHE_DIR")
    registered = mock.patch.dict(loaded._loaded, clear=True)
    with registered, tempfile.TemporaryDirectory(prefix="flexdecode-docs-") as folder:
        os.environ["FLEXDECODE_CACHE_DIR"] = folder
        flexdecode.clear_cache()
        module = sys.modules["example"] = types.ModuleType("example")
        try:
            yield vars(module)
        finally:
            del sys.modules["example"]
            flexdecode.clear_cache()
            if before is None:
                del os.environ["FLEXDECODE_CACHE_DIR"]
            else:
                os.environ["FLEXDECODE_CACHE_DIR"] = before


def run_page(page: Path, gpu: bool) -> None:
    """Runs a page and compares what it prints and raises with what it says."""
    with fresh_process() as namespace:
        for step in read_steps(page):
            if step.code.mark == "gpu" and not gpu:
                continue
            where = f"{page.name}, the block at line {step.code.start + 1}"
            printed, error = run_step(step, namespace)
            if error is not None and step.error is None:
                lines = "".join(traceback.format_exception(type(error), error, error.__traceback__))
                pytest.fail(f"{where} raised:\n{lines}", pytrace=False)
            if step.error is not None:
                assert error is not None, f"{where} raised nothing"
                assert error_text(error) == step.error.text, f"{where} raised another error"
            if step.output is not None:
                assert printed == step.output.text, f"{where} printed something else"


def write_outputs(page: Path, gpu: bool) -> None:
    """Puts into a page what its blocks print and raise now."""
    replacements: list[tuple[Block, str]] = []
    with fresh_process() as namespace:
        for step in read_steps(page):
            if step.code.mark == "gpu" and not gpu:
                continue
            printed, error = run_step(step, namespace)
            if error is not None and step.error is None:
                raise RuntimeError(f"{page.name}, the block at line {step.code.start + 1}") from error
            if step.output is not None:
                replacements.append((step.output, printed))
            if step.error is not None:
                replacements.append((step.error, error_text(error) if error else "(nothing was raised)"))
    lines = page.read_text().splitlines()
    for block, text in reversed(replacements):
        lines[block.start : block.end] = text.splitlines()
    page.write_text("\n".join(lines) + "\n")


# --- Tests ------------------------------------------------------------------------------------------------------------


def _names(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


WITH_CODE = [page for page in PAGES if read_steps(page)]
WITH_GPU_CODE = [page for page in WITH_CODE if any(step.code.mark == "gpu" for step in read_steps(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=_names(WITH_CODE))
def test_code_blocks_do_what_the_page_says(page):
    if page.name in NEEDS:
        pytest.importorskip(NEEDS[page.name], reason="needs transformers: `make test-transformers`")
    run_page(page, gpu=False)


@pytest.mark.gpu
@pytest.mark.parametrize("page", WITH_GPU_CODE, ids=_names(WITH_GPU_CODE))
def test_code_blocks_with_those_for_a_gpu(page):
    run_page(page, gpu=True)


def test_a_page_that_says_something_else_fails(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(1 + 1)\n```\n<!-- output -->\n```text\n3\n```\n")
    with pytest.raises(AssertionError, match="printed something else"):
        run_page(page, gpu=False)
    write_outputs(page, gpu=False)
    run_page(page, gpu=False)
    assert page.read_text().splitlines()[5] == "2"


@pytest.mark.parametrize("page", PAGES[1:], ids=_names(PAGES[1:]))
def test_a_line_of_python_fits_into_a_window(page):
    for block in read_blocks(page):
        for number, line in enumerate(block.text.splitlines(), start=block.start + 1):
            fits = block.language != "python" or len(line) <= LONGEST
            assert fits, f"{page.name}:{number}: {len(line)} characters, but only {LONGEST} fit"


LINK = re.compile(r'\]\(([^)\s]+)(?: "[^"]*")?\)')  # of links and of pictures, which may have a title


def _without_code(page):
    lines, inside = [], False
    for line in page.read_text().splitlines():
        inside ^= line.startswith("```")
        lines.append("" if inside else re.sub(r"`[^`]*`", "", line))
    return lines


def _anchors(page):
    """Anchors of a page: its headings, as Markdown spells them, and the objects that the API page documents."""
    anchors, inside = set(), False
    for line in page.read_text().splitlines():
        inside ^= line.startswith("```")
        if not inside and (heading := re.match(r"#+ (.*)", line)):
            words = re.sub(r"[^\w\s-]", "", heading[1]).strip().lower()
            anchors.add(re.sub(r"[-\s]+", "-", words))
        elif documented := re.match(r"::: ([\w.]+)", line):
            anchors.add(documented[1])
    return anchors


@pytest.mark.parametrize("page", PAGES, ids=_names(PAGES))
def test_internal_links_resolve(page):
    for number, line in enumerate(_without_code(page), start=1):
        for target in LINK.findall(line):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            goal = (page.parent / path).resolve() if path else page
            assert goal.is_file(), f"{page.name}:{number}: no file {target}"
            if anchor and goal.suffix == ".md":
                members = [a for a in _anchors(goal) if anchor.startswith(f"{a}.")]  # members of a documented module
                assert anchor in _anchors(goal) or members, f"{page.name}:{number}: no heading {target}"


def test_documented_objects_exist():
    names = re.findall(r"^::: ([\w.]+)", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert names
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), f"api.md names {name}"


def test_api_page_documents_every_public_name():
    import flexdecode

    text = (ROOT / "docs" / "api.md").read_text()
    names = set(flexdecode.__all__) - {"__version__"}
    assert not {name for name in names if not re.search(rf"^::: flexdecode\.{name}$", text, re.MULTILINE)}


if __name__ == "__main__":
    import torch

    for name in sys.argv[1:] or _names(page for page in WITH_CODE if page.name not in NEEDS):
        write_outputs(ROOT / name, gpu=torch.cuda.is_available())
