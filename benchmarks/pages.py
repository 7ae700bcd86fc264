"""What the pages of the matrix are made of: tables, numbers, lists, and what was measured."""

from .table import group_empty_cells

__all__ = ["empty_cells", "listed", "measured", "number", "table", "time"]


def listed(parts: list[str]) -> str:
    """Some words as one: "a, b and c"."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown; all columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int) -> str:
    """A number, or a dash for none."""
    return "–" if value is None else f"{value:.{digits}f}"


def time(value: float | None, fastest: float | None) -> str:
    """Microseconds, in bold if they are the fewest."""
    return f"**{value:.1f}**" if value is not None and value == fastest else number(value, 1)


def measured(document: dict, what: str) -> str:
    """What a run was made on, with which options, and how.

    Args:
        document: What `matrix.json` or `sections.json` holds.
        what: Sentences about the rows.
    """
    lines = [f"- {name}: {value}" for name, value in document["environment"].items()]
    flags = {name: value for name, value in document["flags"].items() if value not in (None, False) and name != "out"}
    shown = ", ".join(f"{name}={','.join(v) if isinstance(v, list) else v}" for name, v in flags.items())
    lines += [
        f"- options: {shown}",
        f"- time: {document['timestamp']}, the run took {document.get('seconds', 0):.0f} s",
    ]
    protocol = document["protocol"].replace("practical floor", "limit")  # its name in older runs
    return "\n".join([*lines, "", what, "", protocol])


def empty_cells(document: dict) -> str:
    """Columns that were left out, empty cells by cause, and rows that the time did not suffice for."""
    lines = [f"- {note}" for note in document["notes"]]
    for title, reason, rows in group_empty_cells(document):
        where = "; ".join(f"`{row}`" for row in rows[:3]) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")
        lines.append(f"- {title}, {len(rows)} cell{'s' * (len(rows) > 1)}: {reason}. {where}")
    if left_out := document.get("left_out"):
        lines.append(f"- Left out, because the time was over: {'; '.join(left_out)}.")
    return "\n".join(lines) or "None."
