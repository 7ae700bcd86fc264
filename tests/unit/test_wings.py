"""The wings of the package: each imports only those that come before it."""

import ast
from pathlib import Path

import pytest

import flexdecode

PACKAGE = Path(flexdecode.__file__).parent
WINGS = ("frontend", "analysis", "call", "ahead", "codegen", "kv", "runtime", "report", "integrations", "cli")
FOUNDATION = ("errors", "memos", "switch", "triton_api", "version")  # modules that every wing may import
CALLERS = (
    "integrations/transformers/",
    "integrations/vllm/",
    "cli/",
)  # they call the public functions, so they stand above api.py
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if "templates" not in path.parts)


def imported(path):
    """The wings and modules of the package that a file imports, wherever in it, as parts of their names."""
    here = ("flexdecode", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1]
            module = tuple(node.module.split(".")) if node.module else ()
            for alias in node.names:
                yield (*base, *(module or (alias.name,)))[1:]


def test_every_folder_is_a_wing():
    folders = {path.relative_to(PACKAGE).parts[0] for path in MODULES if path.parent != PACKAGE}
    assert folders == set(WINGS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_wing_imports_only_wings_before_it(path):
    name = path.relative_to(PACKAGE).parts[0]
    if name in WINGS:
        public = {"api", "mods"} if path.relative_to(PACKAGE).as_posix().startswith(CALLERS) else set()
        allowed = {*WINGS[: WINGS.index(name) + 1], *FOUNDATION, *public}
        assert {target[0] for target in imported(path)} <= allowed
    elif name.removesuffix(".py") in FOUNDATION:
        assert {target[0] for target in imported(path)} <= set(FOUNDATION)


def test_no_modules_import_each_other_in_a_circle():
    names = {path.relative_to(PACKAGE).with_suffix("").parts for path in MODULES}
    names |= {name[:-1] for name in names if name[-1] == "__init__"}
    before = {}
    for path in MODULES:
        name = path.relative_to(PACKAGE).with_suffix("").parts
        if name[-1] != "__init__":
            before[name] = {target for target in imported(path) if target in names and target != name}
    while free := [name for name, targets in before.items() if not targets & before.keys()]:
        for name in free:
            del before[name]
    assert not before
