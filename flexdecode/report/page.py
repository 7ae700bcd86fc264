"""A report as HTML: for notebooks, and as a page of its own.

The text takes the colours of its surroundings, so it is readable in light and in dark ones. The picture has a white
ground of its own.
"""

from __future__ import annotations

from base64 import b64encode
from html import escape

_PRE = "margin:0.2em 0 0.8em 1em;white-space:pre-wrap;background:transparent;color:inherit"
_LABEL = "cursor:pointer;font-weight:600"
_INNER = "margin-left:1em"
_IMAGE = "max-width:100%;background:white;border-radius:4px"

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ max-width: 75rem; margin: 2rem auto; padding: 0 1rem; font-family: system-ui, sans-serif }}
</style>
</head>
<body>
<h1>flexdecode: {title}</h1>
{body}
</body>
</html>
"""


def body(sections: list[str], png: bytes | None) -> str:
    """The sections of a report as HTML that needs nothing else; the graphs of mods are folded away.

    Args:
        sections: each a heading and indented lines.
        png: the picture; None without one.
    """
    parts = [_section(text) for text in sections]
    if png is not None:
        data = b64encode(png).decode()
        parts.append(f'<img alt="blocks of one decode step" style="{_IMAGE}" src="data:image/png;base64,{data}">')
    return "\n".join(["<div>", *parts, "</div>"])


def page(title: str, content: str) -> str:
    """A whole page around HTML.

    Args:
        title: plain text.
        content: HTML.
    """
    return _PAGE.format(title=escape(title), body=content)


def _section(text: str) -> str:
    heading, *lines = text.splitlines()
    if not lines:
        return f"<p>{escape(heading)}</p>"
    start = lines.index("  graph") if "  graph" in lines else len(lines)
    shown, graph = _pre(lines[:start]), lines[start + 1 :]
    if graph:
        shown += f'<details style="{_INNER}"><summary>graph</summary>{_pre(graph)}</details>'
    return f'<details open><summary style="{_LABEL}">{escape(heading)}</summary>{shown}</details>'


def _pre(lines: list[str]) -> str:
    return f'<pre style="{_PRE}">{escape(chr(10).join(lines))}</pre>'
