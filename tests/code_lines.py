"""Counts lines of code: those of package and templates without docstrings, comments and blank lines.

`python tests/code_lines.py` prints the count of each module, then the functions that are longer than they may be.
"""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# A row or a function for each operation or mod: they grow with what is supported, so the sum leaves them aside.
TABLES = (
    "flexdecode/frontend/activations.py", "flexdecode/frontend/elementwise.py", "flexdecode/frontend/ops.py",
    "flexdecode/mods.py", "templates/elementwise.py", "templates/special_functions.py",
)  # fmt: skip
MAX_FUNCTION = 60
_QUIET = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def modules() -> list[Path]:
    """All modules of package and templates."""
    return sorted(path for folder in ("flexdecode", "templates") for path in (ROOT / folder).rglob("*.py"))


def code_lines(text: str) -> set[int]:
    """The numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _QUIET:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False):
            lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return lines


def function_lines(text: str) -> dict[str, int]:
    """Lines of each function, from its `def` to its end, without its docstring."""
    found = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node, clean=False) is not None
            docstring = (node.body[0].end_lineno or 0) - node.body[0].lineno + 1 if documented else 0
            found[node.name] = (node.end_lineno or 0) - node.lineno + 1 - docstring
    return found


def main() -> None:
    """Prints the counts."""
    total = 0
    for path in modules():
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        count = len(code_lines(text))
        total += count * (name not in TABLES)
        print(f"{count:6d}  {name}{'  (a table)' if name in TABLES else ''}")
    print(f"{total:6d}  in all, tables aside")
    for path in modules():
        for name, lines in function_lines(path.read_text()).items():
            if lines > MAX_FUNCTION:
                print(f"{lines:6d}  lines in {path.relative_to(ROOT).as_posix()}, {name}")


if __name__ == "__main__":
    main()
