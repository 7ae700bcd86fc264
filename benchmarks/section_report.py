"""The page of a run of the sections, made from its `sections.json`.

python -m benchmarks.section_report sections.json --markdown sections.md --png sections.png
python -m benchmarks.section_report first/sections.json second/sections.json --json sections.json

The second joins runs on the same machine, where the time of one does not suffice.
"""

import argparse
import json
import os
import pathlib
import sys
from statistics import geometric_mean

from . import pages
from .sections import SECTIONS
from .table import (
    FAR_FROM_LIMIT,
    ON_A_CPU,
    OURS,
    empty_cells_text,
    fastest_peer,
    gain_of_fastest,
    limit_ratio,
    median,
)

__all__ = ["join", "markdown", "panels_of", "sections_of", "text"]


def sections_of(document: dict) -> list[str]:
    """The sections that have results, in the order in which they were run."""
    return list(dict.fromkeys(result["section"] for result in document["results"]))


def panels_of(document: dict, section: str) -> dict[tuple[str, str], list[dict]]:
    """The results of a section by kind of input and dtype."""
    panels: dict[tuple[str, str], list[dict]] = {}
    for result in document["results"]:
        if result["section"] == section:
            panels.setdefault((result["inputs"], result["row"]["dtype"]), []).append(result)
    return panels


def join(documents: list[dict]) -> dict:
    """One document of several runs of one commit on one machine.

    Raises:
        ValueError: They were not made by the same on the same.
    """
    first, *others = documents
    joined = dict(first)
    for other in others:
        if other["environment"] != first["environment"]:
            raise ValueError("these runs were made on different machines or of different versions: do not join them")
        joined["columns"] = {**joined["columns"], **other["columns"]}
        joined["seconds"] = joined.get("seconds", 0) + other.get("seconds", 0)
        for name in ("results", "empty_cells", "left_out", "notes"):
            joined[name] = joined[name] + [x for x in other[name] if name != "notes" or x not in joined[name]]
    joined["results"] = sorted(joined["results"], key=lambda result: list(SECTIONS).index(result["section"]))
    return joined


def text(document: dict) -> str:
    """All times, for the terminal: a line for each case, then what is missing."""
    lines = []
    for section in sections_of(document):
        for (inputs, dtype), results in panels_of(document, section).items():
            lines.append(f"{SECTIONS[section][0]}, {dtype}, {inputs} inputs (microseconds)")
            for result in results:
                times = {"limit": result["floor_us"]} | {n: median(t) for n, t in result["times_us"].items()}
                shown = ", ".join(
                    f"{document['columns'].get(name, name)} {time:.1f}" for name, time in times.items() if time
                )
                lines.append(f"  {result['label']}: {shown}")
    return "\n".join([*lines, empty_cells_text(document)])


def markdown(document: dict, pictures: list[str]) -> str:
    """The page: what was found, what falls short, the sections with their pictures and tables, what was measured.

    Args:
        document: What `sections.json` holds.
        pictures: Addresses of the pictures, relative to the page, in the order of `sections_of`; or none.
    """
    hardware = document["environment"]["hardware"].split(",")[0]
    parts = [f"# Sections of the matrix: {hardware}", _found(document), "## What falls short", _shortcomings(document)]
    addresses = dict(zip(sections_of(document), pictures, strict=False))
    for section in sections_of(document):
        title, what, _ = SECTIONS[section]
        parts += [f"## {title}", what + _shares(document, section), _picture(title, addresses.get(section))]
        for (inputs, dtype), results in panels_of(document, section).items():
            parts += [f"### {title}: {dtype}, {inputs} inputs", _result_table(results, document)]
    rows = (
        "A case has B sequences of so many cached tokens, then query heads/KV heads. Where it does not say otherwise:"
        " one query token, 32 query heads, 8 KV heads, head dimension 128. The column limit has microseconds, and"
        " × limit the time of flexdecode over it."
    )
    parts += ["## What was measured", pages.measured(document, rows), "## Empty cells", pages.empty_cells(document)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _found(document: dict) -> str:
    """Three sentences that say what was found."""
    results = document["results"]
    ratios = [ratio for r in results if (ratio := limit_ratio(r))]
    if not ratios:
        return ON_A_CPU if document["device"] == "cpu" else "Nothing was measured."
    gains = [gain for r in results if (gain := gain_of_fastest(r))]
    compared = (
        f"flexdecode is the fastest column on {sum(gain >= 1 for gain in gains)} of the {len(gains)} results with a"
        f" peer; the fastest peer of each takes {geometric_mean(gains):.2f} times as long in the geometric mean, and"
        f" {min(gains):.2f} times at least."
        if gains
        else "No peer was measured."
    )
    return (
        f"A decode step takes {geometric_mean(ratios):.2f} times its limit (geometric mean over {len(ratios)} results)."
        " The limit is the time to read the live keys and values once, by the fastest plain read of as many bytes that"
        f" was found on the same GPU in the same run. {compared}"
    )


def _shortcomings(document: dict) -> str:
    """Cases where a peer is faster, cases far from the limit, wrong and missing results, by name."""
    if document["device"] != "cuda":
        return ON_A_CPU
    lines, titles = [], document["columns"]
    for section in sections_of(document):
        for (inputs, dtype), results in panels_of(document, section).items():
            where = f"{SECTIONS[section][0]}, {dtype}, {inputs}"
            behind = [(*found, r) for r in results if (found := fastest_peer(r)) and found[0] < 1]
            if behind:
                named = "; ".join(
                    f"{r['label']} ({titles[peer]} {gain:.2f})" for gain, peer, r in sorted(behind, key=lambda x: x[0])
                )
                lines.append(f"- {where}: a peer is faster on {_cases(len(behind))} (its time over ours): {named}.")
            far = [(ratio, r) for r in results if (ratio := limit_ratio(r)) and ratio > FAR_FROM_LIMIT]
            if far:
                named = "; ".join(f"{r['label']} ({ratio:.2f})" for ratio, r in sorted(far, key=lambda x: -x[0])[:5])
                lines.append(
                    f"- {where}: over {FAR_FROM_LIMIT} times the limit on {_cases(len(far))}, most of all {named}."
                )
    wrong = {titles[cell["column"]]: None for cell in document["empty_cells"] if cell["wrong"]}
    lines += [f"- Wrong results: {pages.listed(list(wrong))}; see the end of the page."] if wrong else []
    missing = sum(cell["column"] == OURS for cell in document["empty_cells"])
    lines += [f"- flexdecode has {missing} empty cells; see the end of the page."] if missing else []
    if document["left_out"]:
        lines.append(f"- Left out, because the time was over: {_cases(len(document['left_out']))}; see the end.")
    return "\n".join(lines) or f"Nothing: fastest on every case, and within {FAR_FROM_LIMIT} times the limit."


def _cases(number: int) -> str:
    return f"{number} case{'s' * (number > 1)}"


def _shares(document: dict, section: str) -> str:
    """What mods take beside the same call without one: a sentence of the section `mods`, nothing in others."""
    if section != "mods":
        return ""
    shares = {r["mod"]: [] for results in panels_of(document, section).values() for r in results if r["mod"] != "none"}
    for results in panels_of(document, section).values():
        for result in results:
            if (share := _share_over_none(result, results)) is not None:
                shares[result["mod"]].append(share)
    told = [f"{mod} {max(of):+.1%}" for mod, of in shares.items() if of]
    if not told or document["device"] != "cuda":
        return ""
    return f" The time over that of the same call without a mod, at most: {pages.listed(told)}."


def _share_over_none(result: dict, results: list[dict]) -> float | None:
    """The share of time that a mod adds to the same shape without one; None where its mask leaves other bytes."""
    if result["mod"] == "none":
        return None
    for plain in results:
        if plain["mod"] == "none" and all(plain[name] == result[name] for name in ("row", "live_kv_bytes")):
            ours, without = (median(r["times_us"].get(OURS)) for r in (result, plain))
            return ours / without - 1 if ours and without else None
    return None


def _picture(title: str, address: str | None) -> str:
    return f'[![Time of each case over its limit: {title}]({address} "{title}")]({address})' if address else ""


def _result_table(results: list[dict], document: dict) -> str:
    """A row for each case, with the limit, the fastest peer and every column that ran one."""
    peers = {name: title for name, title in document["columns"].items() if name != OURS}
    peers = {name: title for name, title in peers.items() if any(r["times_us"].get(name) for r in results)}
    with_shares = any(_share_over_none(r, results) is not None for r in results)
    header = ["case", "limit", "flexdecode", "× limit", "fastest peer / flexdecode", *peers.values()]
    header += ["over no mod"] if with_shares else []
    wrong = {(c["label"], c["mod"], c["inputs"], c["column"]) for c in document["empty_cells"] if c["wrong"]}
    rows = []
    for result in results:
        times = {name: median(result["times_us"].get(name)) for name in document["columns"]}
        fastest = min((us for us in times.values() if us), default=None)
        of_row = result["label"], result["mod"], result["inputs"]
        cells = [result["label"], pages.number(result["floor_us"], 1), pages.time(times.get(OURS), fastest)]
        cells += [pages.number(limit_ratio(result), 2), _named(fastest_peer(result), document)]
        cells += ["wrong" if (*of_row, name) in wrong else pages.time(times[name], fastest) for name in peers]
        if with_shares:
            share = _share_over_none(result, results)
            cells.append("–" if share is None else f"{share:+.1%}")
        rows.append(cells)
    return f"Microseconds per call; the fastest column in bold.\n\n{pages.table(header, rows)}"


def _named(found: tuple[float, str] | None, document: dict) -> str:
    """The gain over the fastest peer, and which one it is."""
    return f"{found[0]:.2f} ({document['columns'][found[1]]})" if found else "–"


def main(arguments: list[str] | None = None) -> int:
    """Write the page and the pictures of a recorded run, or print its times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.section_report", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=pathlib.Path, nargs="+", help="a sections.json, or several of one machine")
    parser.add_argument("--json", type=pathlib.Path, help="write the joined record here")
    parser.add_argument("--markdown", type=pathlib.Path, help="write the page here")
    parser.add_argument("--png", type=pathlib.Path, help="write the pictures beside this, with the names of sections")
    options = parser.parse_args(arguments)
    document = join([json.loads(path.read_text()) for path in options.results])
    if options.json:
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    pictures: list[pathlib.Path] = []
    if options.png:
        from .section_figure import draw_all

        pictures = draw_all(document, options.png)
    if options.markdown:
        addresses = [os.path.relpath(picture, options.markdown.parent) for picture in pictures]
        options.markdown.write_text(markdown(document, addresses))
    if not options.png and not options.markdown and not options.json:
        print(text(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
