"""Makes a complete Triton module from a template file and the bodies of its hooks.

A template is ordinary Triton. Its hook functions are found with `ast`, their names and parameters are checked, and
their bodies are exchanged line by line; everything else stays as it stands in the file.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import textwrap
from pathlib import Path

from .lower import Hooks

HOOK_PARAMETERS = {
    "score_row": ("b", "h", "q_idx", "captures"),
    "score_mod": ("score", "b", "h", "q_idx", "kv_idx", "row", "captures"),
    "mask_row": ("b", "h", "q_idx", "captures"),
    "mask_mod": ("live", "b", "h", "q_idx", "kv_idx", "row", "captures"),
}


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
def templates_digest() -> str:
    """Hash of all template files: an edited template makes new modules."""
    texts = [path.read_bytes() for path in sorted(template_folder().glob("*.py"))]
    return hashlib.sha256(b"".join(texts)).hexdigest()


def generate(hooks: list[Hooks], replacements: str | None = None) -> str:
    """Writes the module of one kernel.

    Args:
        hooks: bodies for the hooks of `decode.py`, at most one for each.
        replacements: a template file whose functions take the place of those of the same name (other KV loads).
    """
    text = read_template("decode.py")
    if replacements is not None:
        text = _replace_functions(text, read_template(replacements))
    for hook in hooks:
        for name, body in hook.bodies.items():
            text = _replace_body(text, name, body)
    called = frozenset().union(*(hook.functions for hook in hooks))
    return _insert_functions(text, called) if called else text


def _functions(text: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def _lines_of(node: ast.FunctionDef) -> tuple[int, int]:
    """First line (its decorator's) and end of a function, as a slice of lines."""
    assert node.end_lineno is not None
    return min(d.lineno for d in node.decorator_list) - 1, node.end_lineno


def _parameters(node: ast.FunctionDef) -> tuple[str, ...]:
    return tuple(a.arg for a in node.args.args)


def _replace_body(text: str, name: str, body: str) -> str:
    """Exchanges what a hook does; its signature and docstring stay."""
    node = _functions(text).get(name)
    if node is None or _parameters(node) != HOOK_PARAMETERS[name]:
        raise ValueError(f"the template has no hook {name}{HOOK_PARAMETERS[name]}")
    lines = text.splitlines(keepends=True)
    start, end = node.body[1].lineno - 1, node.end_lineno
    return "".join([*lines[:start], textwrap.indent(body, "    ") + "\n", *lines[end:]])


def _replace_functions(text: str, other: str) -> str:
    """Exchanges whole functions for those of the same name and parameters in another file."""
    other_lines = other.splitlines(keepends=True)
    for name, node in _functions(other).items():
        old = _functions(text).get(name)
        if old is None or _parameters(old) != _parameters(node):
            raise ValueError(f"the template has no hook {name}{_parameters(node)}")
        (start, end), (new_start, new_end) = _lines_of(old), _lines_of(node)
        lines = text.splitlines(keepends=True)
        text = "".join([*lines[:start], *other_lines[new_start:new_end], *lines[end:]])
    return text


def _insert_functions(text: str, called: frozenset[str]) -> str:
    """Puts the elementwise functions that the hooks call, and those that these call, before the hooks."""
    source = read_template("elementwise.py")
    functions = _functions(source)
    wanted: set[str] = set()
    pending = [name for name in called if name in functions]
    while pending:
        name = pending.pop()
        if name not in wanted:
            wanted.add(name)
            names = {n.id for n in ast.walk(functions[name]) if isinstance(n, ast.Name)}
            pending.extend(n for n in names if n in functions)
    lines = source.splitlines(keepends=True)
    blocks = ["".join(lines[slice(*_lines_of(node))]) for name, node in functions.items() if name in wanted]
    start, _ = _lines_of(_functions(text)["score_row"])
    head = text.splitlines(keepends=True)
    return "".join([*head[:start], "\n\n".join(blocks), "\n\n" if blocks else "", *head[start:]])
