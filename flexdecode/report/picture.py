"""A picture of one decode step: which blocks of the KV cache each item reads, and which split reads them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from .blocks import DEAD, FULL, PARTIAL, UNUSED, Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_ROWS, MAX_COLUMNS = 64, 512  # cells of the map; if there are more items or blocks, a cell stands for several
MAX_SHARES = 40  # splits whose numbers are written

# The colours of a block, by its state. Blocks of even and odd splits have different shades, so neighbours differ.
COLOURS = {
    UNUSED: ("#ffffff", "#ffffff"),
    DEAD: ("#e1e4e8", "#e1e4e8"),
    PARTIAL: ("#d9660b", "#f7b267"),
    FULL: ("#0b5394", "#6aa5dc"),
}
_INK, _FAINT = "#22262a", "#9aa1a8"


def count(number: int, noun: str) -> str:
    """A number of things, in words."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def draw(step: Step, title: str, file: Path | IO[bytes], kind: str) -> None:
    """Draws a step.

    The upper part is a map with a row per item and a column per block. The lower part shows the work of one item in the
    order in which its splits take it.

    Args:
        step: what is read.
        title: names of the mods.
        file: what to write to.
        kind: `png`, `svg` or `pdf`.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("save_picture needs matplotlib: `pip install flexdecode[bench]`") from error
    style: dict[Any, Any] = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    with rc_context({"font.family": "DejaVu Sans", "axes.edgecolor": _FAINT, **style}):
        height = 0.5 + 0.11 * min(max(step.num_items, 8), MAX_ROWS)
        figure = Figure(figsize=(12, height + 2.9), layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, height_ratios=[height, 0.5])
        figure.suptitle(f"One decode step: {title}", fontsize=14, weight="bold", x=0.008, ha="left")
        _draw_map(upper, step)
        _draw_work(lower, step)
        _draw_legend(figure, "past the end of the sequence" if step.kv_starts is None else "outside the sequence")
        figure.savefig(file, dpi=110, facecolor="white", format=kind)


def cells(step: Step) -> tuple[torch.Tensor, int, int]:
    """The map, the number of items per row, and the number of blocks per column.

    A cell is `2 * state + (1 if the split is odd)`, int64. A cell that stands for several blocks shows a full block if
    there is one, else a partial block, else a dead one.
    """
    items, blocks = _items_per_row(step), max(1, -(-step.num_blocks // MAX_COLUMNS))
    shape = max(1, -(-step.num_items // items)), max(1, -(-step.num_blocks // blocks))
    found = torch.full(shape, 2 * UNUSED, device="cpu")
    for item in range(step.num_items):
        states, splits = step.blocks(item)
        codes = 2 * states + (splits % 2) * (splits >= 0)
        codes = pad(codes, (0, shape[1] * blocks - len(codes)), value=2 * UNUSED).view(-1, blocks)
        # Among blocks of the same state, the first one decides the shade.
        chosen = codes.gather(1, (codes // 2).argmax(1, keepdim=True))[:, 0]
        row = found[item // items]
        found[item // items] = torch.where(chosen // 2 > row // 2, chosen, row)
    return found, items, blocks


def _items_per_row(step: Step) -> int:
    """How many items share a row: a part of the items of one sequence, or those of several whole sequences."""
    per_sequence, batch = step.num_kv_heads * step.num_tiles, len(step.kv_lens)
    for items in range(1, per_sequence + 1):
        if per_sequence % items == 0 and step.num_items // items <= MAX_ROWS:
            return items
    return per_sequence * -(-batch // MAX_ROWS)


def _draw_map(axes: Axes, step: Step) -> None:
    codes, items, blocks = cells(step)
    rows, columns = codes.shape
    _show(axes, codes, (0, columns * blocks * step.block_n, rows * items, 0))
    axes.set_xlim(0, max(1, step.num_blocks) * step.block_n)
    per_sequence, batch = step.num_kv_heads * step.num_tiles, len(step.kv_lens)
    for sequence in range(1, batch if batch <= MAX_ROWS else 0):
        axes.axhline(sequence * per_sequence, color=_FAINT, lw=0.6)
    labels = range(0, batch, -(-batch // 16))
    axes.set_yticks([(s + 0.5) * per_sequence for s in labels], [str(s) for s in labels])
    heads = count(step.num_kv_heads, "KV head") + (f" x {step.num_tiles} row tiles" if step.num_tiles > 1 else "")
    axes.set_ylabel(f"sequence\n({heads}{f'; a row is {items} items' if items > 1 else ''})")
    column = f"{blocks} blocks" if blocks > 1 else "a block"
    place = "slot of the cache" if step.shifted else "position in the sequence"
    axes.set_xlabel(f"{place} (tokens); a column is {column} of {step.block_n} keys")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    axes.tick_params(length=0)
    counts = step.counts
    used, read, share = sum(counts.values()), counts[FULL] + counts[PARTIAL], step.share_read or 0.0
    programs = f"{count(step.num_items, 'item')} x {count(step.num_splits, 'split')}"
    if step.balanced:
        programs = f"{count(step.num_items, 'item')} shared by {count(step.num_splits, 'worker')}"
    title = f"{read:,} of {used:,} blocks in use are read ({100 * share:.1f}% of the blocks), by {programs}"
    axes.set_title(title, loc="left", fontsize=10)


def _draw_work(axes: Axes, step: Step) -> None:
    """Draws the work of the item with the most work, in the order of the kernel."""
    item = int(step.work.argmax())
    states, splits = step.blocks(item)
    order = torch.cat([(states == FULL).nonzero()[:, 0], (states == PARTIAL).nonzero()[:, 0]])
    codes = 2 * states[order] + splits[order] % 2 if len(order) else torch.tensor([2 * UNUSED], device="cpu")
    _show(axes, codes[None], (0, len(codes), 1, 0))
    starts = [i for i in range(len(order)) if i == 0 or splits[order[i]] != splits[order[i - 1]]]
    for start, end in pairwise([*starts, len(order)] if len(starts) <= MAX_SHARES else []):
        split = int(splits[order[start]])
        axes.axvline(start, color="white", lw=1.5)
        axes.text((start + end) / 2, 0.5, str(split), color=_INK if split % 2 else "white", ha="center", va="center")
    kinds = [count(int((states == s).sum()), f"{name} block") for s, name in ((FULL, "full"), (PARTIAL, "partial"))]
    head = item // step.num_tiles % step.num_kv_heads
    title = f"Work of sequence {step.sequence(item)}, KV head {head}: {', then '.join(kinds)}"
    axes.set_title(f"{title}, shared by {count(len(starts), 'split')}", loc="left", fontsize=10)
    axes.set_yticks([])
    axes.locator_params(axis="x", integer=True)
    numbers = "; the number is that of the split" if len(starts) <= MAX_SHARES else ""
    axes.set_xlabel(f"blocks in the order in which they are read{numbers}")


def _show(axes: Axes, codes: torch.Tensor, extent: tuple[float, float, float, float]) -> None:
    from matplotlib.colors import ListedColormap

    palette = ListedColormap([colour for state in sorted(COLOURS) for colour in COLOURS[state]])
    axes.imshow(
        codes.numpy(), cmap=palette, vmin=0, vmax=palette.N - 1, extent=extent, aspect="auto", interpolation="nearest"
    )  # fmt: skip


def _draw_legend(figure: Figure, unused: str) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    entries = [
        (FULL, "full: the mask is not evaluated"),
        (PARTIAL, "partial: checked key by key"),
        (DEAD, "dead: never loaded"),
        (UNUSED, unused),
    ]
    handles: list[Any] = []
    for state, _ in entries:
        shades = dict.fromkeys(COLOURS[state])
        handles.append(tuple(Patch(facecolor=c, edgecolor=_FAINT if state == UNUSED else c) for c in shades))
    figure.legend(
        handles, [text for _, text in entries], handler_map={tuple: HandlerTuple(ndivide=None, pad=0)}, ncols=4,
        loc="outside lower center", frameon=False, fontsize=10, title="dark and light: even and odd splits",
        title_fontsize=9,
    )  # fmt: skip
