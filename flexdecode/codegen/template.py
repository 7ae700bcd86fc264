"""Makes a complete Triton module from a template file and the bodies of its hooks.

A template is ordinary Triton. Its hook functions are found with `ast`, their names and parameters are checked, and the
lines of their bodies are replaced. Whole functions can come from other files: other KV loads, another schedule. All
other text stays as it is in the file.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
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


# The files with the functions that the op table's texts call. A function may call functions of both files.
ELEMENTWISE_FILES = ("elementwise.py", "special_functions.py")


@functools.cache
def template_folder() -> Path:
    """The folder of the template files: inside the installed package, or next to it in a source checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "templates", package.parent / "templates"):
        if (folder / "decode.py").is_file():
            return folder
    raise FileNotFoundError("flexdecode's templates are missing: the installation is damaged, install it again")


@functools.cache
def read_template(name: str) -> str:
    """The text of a template file."""
    return (template_folder() / name).read_text()


@functools.cache
def _tree(name: str) -> ast.Module:
    """A template file, parsed."""
    return ast.parse(read_template(name))


@functools.cache
def sources_digest() -> str:
    """Hash of all template files and of this package. After an edit of one of them, modules are generated again.

    It is the same for a checkout and for an installed package.
    """
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = []
    for place, folders, names in os.walk(package):
        if place == package and "templates" in folders:  # in an installed package
            folders.remove("templates")
        found += [os.path.join(place, name) for name in names if name.endswith((".py", ".c"))]
    digest = hashlib.sha256()
    for path in (*sorted(map(str, template_folder().glob("*.py"))), *sorted(found)):
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def generate(hooks: list[Hooks], replacements: Sequence[str] = ()) -> str:
    """Writes the module of one kernel.

    Args:
        hooks: bodies for the hooks of `decode.py`, at most one for each.
        replacements: template files whose functions take the place of those of the same name. Where two files have the
            same function, the later file wins.
    """
    template = _functions("decode.py")
    replaced, added = _exchange(template, replacements)
    edits = list(replaced.values())
    for hook in hooks:
        edits += [_body(template, name, body) for name, body in hook.bodies.items()]
    called = frozenset().union(*(hook.functions for hook in hooks))
    start, _ = _lines_of(template["kv_bounds"])
    edits.append((start, start, elementwise_functions(called) + "".join(f"{text}\n\n" for text in added.values())))
    known = _imports("decode.py")
    more = [text for name in replacements for text, _ in _imports(name).items() if text not in known]
    end = max(known.values())
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
    """The imports of a template file, also those inside `try`, and the line after each.

    Imports from `decode.py` are left out, because the generated module already contains its text.
    """
    nodes = [n for n in _tree(name).body if isinstance(n, (ast.Import, ast.ImportFrom, ast.Try))]
    return {ast.unparse(n): n.end_lineno or 0 for n in nodes if getattr(n, "module", None) != "decode"}


_Edit = tuple[int, int, str]  # lines start:end become the text


_Definition = ast.FunctionDef | ast.Assign


@functools.cache
def _definitions(name: str) -> list[_Definition]:
    """The functions and records of a template file."""
    return [node for node in _tree(name).body if isinstance(node, _Definition)]


@functools.cache
def _functions(name: str) -> dict[str, ast.FunctionDef]:
    """The functions of a template file."""
    return {node.name: node for node in _definitions(name) if isinstance(node, ast.FunctionDef)}


def _lines_of(node: _Definition) -> tuple[int, int]:
    """First line (its decorator's) and end of a function or record, as a slice of lines."""
    assert node.end_lineno is not None
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))]) - 1, node.end_lineno


def _source(name: str, node: _Definition) -> str:
    start, end = _lines_of(node)
    return "".join(read_template(name).splitlines(keepends=True)[start:end])


def _parameters(node: ast.FunctionDef) -> tuple[str, ...]:
    return tuple(a.arg for a in node.args.args)


@functools.cache
def parameters_of(name: str, function: str) -> tuple[str, ...]:
    """The parameters of a function of a template file."""
    return _parameters(_functions(name)[function])


def _body(template: dict[str, ast.FunctionDef], name: str, body: str) -> _Edit:
    """Replaces the body of a hook; its signature and docstring stay."""
    node = template.get(name)
    if node is None or _parameters(node) != HOOK_PARAMETERS[name]:
        raise ValueError(f"the template has no hook {name}{HOOK_PARAMETERS[name]}")
    assert node.end_lineno is not None
    return node.body[1].lineno - 1, node.end_lineno, textwrap.indent(body, "    ") + "\n"


def _exchange(template: dict[str, ast.FunctionDef], files: Sequence[str]) -> tuple[dict[str, _Edit], dict[str, str]]:
    """Replaces whole functions by those of the same name and parameters in other files.

    Returns:
        The edits by name, and the helpers and records that these files define. If two files have the same name, the
        later file wins.
    """
    replaced: dict[str, _Edit] = {}
    added: dict[str, str] = {}
    for file in files:
        for node in _definitions(file):
            name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else node.name
            old = template.get(name)
            if isinstance(node, ast.Assign) or name.startswith("_"):
                added[name] = _source(file, node)
            elif old is not None and _parameters(old) == _parameters(node):
                replaced[name] = (*_lines_of(old), _source(file, node))
            else:
                raise ValueError(f"the template has no hook {name}{_parameters(node)}")
    return replaced, added


@functools.cache
def standalone(name: str) -> str:
    """The module of a template file that no mod changes, with what it imports of `decode.py`.

    Raises:
        ValueError: it imports something else of that file.
    """
    tree = _tree(name)
    wanted = {a.name for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "decode" for a in n.names}
    imports = "from collections import namedtuple\n\nimport triton\nimport triton.language as tl"
    texts = [f'"""{ast.get_docstring(tree)}"""', imports]
    functions = _called(wanted, ["decode.py"]).rstrip()
    used = {n.id for n in ast.walk(ast.parse(functions)) if isinstance(n, ast.Name)} | wanted
    for node in _tree("decode.py").body:
        if isinstance(node, ast.If):  # imports that not every Triton has
            texts.append(ast.unparse(node))
            wanted -= {a.name for n in node.body if isinstance(n, ast.ImportFrom) for a in n.names}
        elif isinstance(node, ast.Assign):
            target = ast.unparse(node.targets[0])
            if target in used or "constexpr" in ast.unparse(node.value):
                texts.append(ast.unparse(node))
            wanted.discard(target)
    if wanted - _functions("decode.py").keys():
        raise ValueError(f"{name} imports {sorted(wanted - _functions('decode.py').keys())}, which cannot be copied")
    texts.append(functions)
    texts += [_source(name, node) for node in _definitions(name)]
    return "\n\n".join(texts)


def elementwise_functions(called: Iterable[str]) -> str:
    """The elementwise functions that the hooks call, and those that these call."""
    return _called(called, ELEMENTWISE_FILES)


def _called(called: Iterable[str], files_of: Sequence[str]) -> str:
    """The functions of some files that are called, and those that these call."""
    if not called:
        return ""
    files = {name: file for file in files_of for name in _functions(file)}
    wanted: set[str] = set()
    pending = [name for name in called if name in files]
    while pending:
        name = pending.pop()
        if name not in wanted:
            wanted.add(name)
            names = {n.id for n in ast.walk(_functions(files[name])[name]) if isinstance(n, ast.Name)}
            pending.extend(n for n in names if n in files)
    return "".join(_source(files[name], _functions(files[name])[name]) + "\n\n" for name in files if name in wanted)
