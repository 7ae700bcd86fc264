"""Makes a complete Triton module from a template file and the bodies of its hooks.

A template is ordinary Triton. Its hook functions are found with `ast`, their names and parameters are checked, and
their bodies are exchanged line by line; everything else stays as it stands in the file.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from .lower import Hooks

HOOK_PARAMETERS = {
    "kv_bounds": ("b", "h", "q_idx", "score_captures", "mask_captures"),
    "score_row": ("b", "h", "q_idx", "captures"),
    "score_fetch": ("live", "b", "h", "q_idx", "kv_idx", "row", "captures"),
    "score_mod": ("score", "b", "h", "q_idx", "kv_idx", "row", "fetched", "captures"),
    "mask_row": ("b", "h", "q_idx", "captures"),
    "mask_mod": ("live", "b", "h", "q_idx", "kv_idx", "row", "captures"),
}


# What the texts of the op table call; a function may call those of either file.
ELEMENTWISE_FILES = ("elementwise.py", "special_functions.py")


@functools.cache
def template_folder() -> Path:
    """The folder of the template files: inside the installed package, or beside it in a source checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "templates", package.parent / "templates"):
        if (folder / "decode.py").is_file():
            return folder
    raise FileNotFoundError("flexdecode's templates are missing: the installation is damaged, install it again")


@functools.cache
def read_template(name: str) -> str:
    """The text of a template file."""
    return (template_folder() / name).read_text()


@functools.cache
def sources_digest() -> str:
    """Hash of all template files and of this package: where one is edited, modules are made anew."""
    paths = [*template_folder().glob("*.py"), *Path(__file__).parent.glob("*.py")]
    texts = [path.read_bytes() for path in sorted(paths, key=lambda path: path.name)]
    return hashlib.sha256(b"".join(texts)).hexdigest()


def generate(hooks: list[Hooks], replacements: Sequence[str] = ()) -> str:
    """Writes the module of one kernel.

    Args:
        hooks: bodies for the hooks of `decode.py`, at most one for each.
        replacements: template files whose functions take the place of those of the same name (other KV loads, or
            another way to find the blocks).
    """
    template = _functions("decode.py")
    # Of two files that have the same function, the later one wins.
    chosen = {edit[:2]: edit for name in replacements for edit in _whole_functions(template, name)}
    edits = list(chosen.values())
    for hook in hooks:
        edits += [_body(template, name, body) for name, body in hook.bodies.items()]
    called = frozenset().union(*(hook.functions for hook in hooks))
    start, _ = _lines_of(template["kv_bounds"])
    edits.append((start, start, elementwise_functions(called)))
    known = _imports("decode.py")
    more = [text for name in replacements for text, _ in _imports(name).items() if text not in known]
    end = known["import triton.language as tl"]
    edits.append((end, end, "".join(f"{text}\n" for text in more)))
    lines = read_template("decode.py").splitlines(keepends=True)
    if any("score_mod" in hook.bodies for hook in hooks):
        flag = lines.index(next(line for line in lines if line.startswith("HAS_SCORE_MOD")))
        edits.append((flag, flag + 1, "HAS_SCORE_MOD = tl.constexpr(True)\n"))
    for start, end, text in sorted(edits, reverse=True):
        lines[start:end] = [text]
    return "".join(lines)


@functools.cache
def _imports(name: str) -> dict[str, int]:
    """The imports of a template file, also those that are tried, and the line after each."""
    nodes = ast.parse(read_template(name)).body
    return {ast.unparse(n): n.end_lineno or 0 for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom, ast.Try))}


_Edit = tuple[int, int, str]  # lines start:end become the text


@functools.cache
def _functions(name: str) -> dict[str, ast.FunctionDef]:
    """The functions of a template file."""
    return {node.name: node for node in ast.parse(read_template(name)).body if isinstance(node, ast.FunctionDef)}


def _lines_of(node: ast.FunctionDef) -> tuple[int, int]:
    """First line (its decorator's) and end of a function, as a slice of lines."""
    assert node.end_lineno is not None
    return min(d.lineno for d in node.decorator_list) - 1, node.end_lineno


def _source(name: str, node: ast.FunctionDef) -> str:
    start, end = _lines_of(node)
    return "".join(read_template(name).splitlines(keepends=True)[start:end])


def _parameters(node: ast.FunctionDef) -> tuple[str, ...]:
    return tuple(a.arg for a in node.args.args)


def _body(template: dict[str, ast.FunctionDef], name: str, body: str) -> _Edit:
    """Exchanges what a hook does; its signature and docstring stay."""
    node = template.get(name)
    if node is None or _parameters(node) != HOOK_PARAMETERS[name]:
        raise ValueError(f"the template has no hook {name}{HOOK_PARAMETERS[name]}")
    assert node.end_lineno is not None
    return node.body[1].lineno - 1, node.end_lineno, textwrap.indent(body, "    ") + "\n"


def _whole_functions(template: dict[str, ast.FunctionDef], other: str) -> list[_Edit]:
    """Exchanges whole functions for those of the same name and parameters in another file.

    Functions of that file whose names start with an underscore come along.
    """
    edits, helpers = [], ""
    for name, node in _functions(other).items():
        if name.startswith("_"):
            helpers += _source(other, node) + "\n\n"
            continue
        old = template.get(name)
        if old is None or _parameters(old) != _parameters(node):
            raise ValueError(f"the template has no hook {name}{_parameters(node)}")
        edits.append((*_lines_of(old), helpers + _source(other, node)))
        helpers = ""
    return edits


def elementwise_functions(called: Iterable[str]) -> str:
    """The elementwise functions that the hooks call, and those that these call."""
    files = {name: file for file in ELEMENTWISE_FILES for name in _functions(file)}
    wanted: set[str] = set()
    pending = [name for name in called if name in files]
    while pending:
        name = pending.pop()
        if name not in wanted:
            wanted.add(name)
            names = {n.id for n in ast.walk(_functions(files[name])[name]) if isinstance(n, ast.Name)}
            pending.extend(n for n in names if n in files)
    return "".join(_source(files[name], _functions(files[name])[name]) + "\n\n" for name in files if name in wanted)
