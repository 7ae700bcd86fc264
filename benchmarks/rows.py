"""The rows of the performance matrix: 60 shapes with their labels and byte counts.

They are those of xformers' flash-decoding benchmark, xformers/benchmarks/benchmark_attn_decoding.py, in three dtypes.
"""

import csv
import dataclasses
import pathlib
import re

import torch

from .cases import Case

__all__ = ["Row", "load_rows", "select", "select_rows", "shrink"]

TABLE = pathlib.Path(__file__).with_name("xformers_rows.csv")


@dataclasses.dataclass(frozen=True)
class Row:
    """One shape of the matrix.

    The field names are those of xformers' benchmark: `B` sequences, `Mq` query tokens and `Mkv` cached tokens each,
    `Hq` query heads over `Hkv` key/value heads, head dimension `K`.

    Attributes:
        dtype: Name of the torch dtype ("float16").
        total_bytes: The label's figure. The benchmark counts 2 bytes an element on its float32 rows too, so it is
            part of the label only: bandwidths use `compulsory_bytes`.
        pytorch_us: The benchmark's figure for plain PyTorch in microseconds, measured elsewhere; None if absent.
        optimized_us: The benchmark's figure for its best kernel, likewise.
    """

    B: int
    Mq: int
    Mkv: int
    Hq: int
    Hkv: int
    K: int
    dtype: str
    total_bytes: int
    pytorch_us: float | None = None
    optimized_us: float | None = None

    @property
    def label(self) -> str:
        """The row's name, exactly as the benchmark prints it."""
        shape = f"B={self.B} Mq={self.Mq} Mkv={self.Mkv} Hq={self.Hq} Hkv={self.Hkv} K={self.K}"
        return f"{shape} dtype={self.torch_dtype} TotalBytes={self.total_bytes}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of query, key, value and output."""
        return getattr(torch, self.dtype)

    def case(self, mod: str, window: int, columns: tuple[str, ...]) -> Case:
        """The row with a mod, as a case that some columns run."""
        return Case(
            self.label, (self.Mkv,) * self.B, self.Hq, self.Hkv, self.K, dtype=self.dtype, mod=mod, window=window,
            num_queries=self.Mq, columns=columns, row=dataclasses.asdict(self),
        )  # fmt: skip


def load_rows() -> list[Row]:
    """Read the 60 rows of `xformers_rows.csv`, in its order."""
    with TABLE.open(newline="") as file:
        return [_parse(record) for record in csv.DictReader(file)]


def _parse(record: dict[str, str]) -> Row:
    sizes = {name: int(record[name]) for name in ("B", "Mq", "Mkv", "Hq", "Hkv", "K")}
    reported = {name: float(record[name]) if record[name] else None for name in ("pytorch_us", "optimized_us")}
    return Row(**sizes, dtype=record["dtype"], total_bytes=int(record["TotalBytes"]), **reported)


def shrink(row: Row) -> Row:
    """The row scaled to a CPU: 1/16 of the tokens of each sequence, half the head dimension.

    The benchmark's own figures belong to the full shape and are dropped.
    """
    small = dataclasses.replace(row, Mkv=row.Mkv // 16, K=row.K // 2, pytorch_us=None, optimized_us=None)
    half_precision_kv = 2 * small.B * small.Hkv * small.Mkv * small.K * 2
    return dataclasses.replace(small, total_bytes=half_precision_kv + 2 * small.B * small.Hq * small.Mq * small.K * 2)


def select_rows(rows: list[Row], selector: str | None, dtypes: list[str]) -> list[Row]:
    """Keep the rows of `dtypes` that `selector` names; see `select`.

    Raises:
        ValueError: No row is left.
    """
    chosen = select([row for row in rows if row.dtype in dtypes], selector)
    if not chosen:
        raise ValueError(f"no row matches --rows {selector!r} with --dtypes {','.join(dtypes)}")
    return chosen


def select(items: list, selector: str | None) -> list:
    """Keep the rows or cases that `selector` names.

    Args:
        items: Things with a `label`.
        selector: None for all, a number ("6": the first six), a range ("6:12"), or a regular expression that is
            searched for in the label ("Mkv=256 .*Hkv=1").
    """
    if selector and (span := re.fullmatch(r"(?:(\d+):)?(\d+)", selector)):
        return items[int(span[1] or 0) : int(span[2])]
    return [item for item in items if selector is None or re.search(selector, item.label)]
