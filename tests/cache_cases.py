"""Caches as servers have them: pages in any order, quantised elements, what lies past the sequences, for all tiers."""

import torch

QUANTISED = {
    "int8": torch.int8, "e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2,
}  # fmt: skip
SCALES = ["number", "heads", "sequences", "tokens"]


def fill_with_nan(tensor):
    """Overwrites a tensor with NaN; int8, which has none, with 127."""
    if tensor.element_size() == 1:
        tensor.view(torch.uint8).fill_(0x7F)
    else:
        tensor.fill_(torch.nan)
    return tensor


def spoil(tensor, lens):
    """Overwrites what lies past `lens` in `[B, Hkv, N, ...]`, in place."""
    for row, length in zip(tensor, lens, strict=True):
        fill_with_nan(row[:, length:])
    return tensor


class Pages:
    """A page table for sequences of lengths `lens`, and `place`, which puts caches where it says.

    Pages come in a random order, among as many that no sequence has and that hold NaN; so do the rows past the end of a
    sequence. The first `shared` pages of all sequences are the same ones.

    Args:
        lens: tokens of each sequence.
        page_size: tokens of a page.
        max_pages: columns of the table, by default one more than the longest sequence needs.
        shared: pages that sequences begin with together, where they are as long.
        dtype: of the table.
        strided: whether the table is a view of every second column of a larger one.
        dead: what entries past the last page of a sequence hold, in turn; None is the number of pages.
        device: of everything.
        seed: of the order of pages.
    """

    def __init__(
        self, lens, page_size, max_pages=None, *, shared=0, dtype=torch.int32, strided=False,
        dead=(-1, None, 1 << 30, 0), device="cpu", seed=0,
    ):  # fmt: skip
        counts = [-(-length // page_size) for length in lens]
        self.lens, self.page_size, self.device = lens, page_size, device
        max_pages = max([*counts, 0]) + 1 if max_pages is None else max_pages
        self.num_pages = 2 * max(sum(counts), 1) + 1
        places = iter(torch.randperm(self.num_pages, generator=torch.Generator().manual_seed(seed)).tolist())
        prefix = [next(places) for _ in range(min(shared, max([*counts, 0])))]
        self.pages = [(prefix + [next(places) for _ in range(n - len(prefix))])[:n] for n in counts]
        entries = [self.num_pages if entry is None else entry for entry in dead]
        table = torch.tensor([entries[i % len(entries)] for i in range(len(lens) * max_pages)], dtype=dtype)
        table = table.reshape(len(lens), max_pages)
        for row, pages in zip(table, self.pages, strict=True):
            row[: len(pages)] = torch.tensor(pages, dtype=dtype)
        self.table = table.to(device)
        if strided:
            storage = torch.full((len(lens) + 1, 2 * max_pages + 1), -1, dtype=dtype, device=device)
            self.table = storage[1:, 1::2].copy_(table)

    @property
    def max_kv_len(self):
        return self.table.shape[1] * self.page_size

    def place(self, cache, layout="hnd"):
        """Puts `[B, Hkv, N, ...]` into pages `[num_pages, Hkv, page_size, ...]`, between two pages of NaN.

        With the layout `nhd` memory is `[num_pages, page_size, Hkv, ...]`.
        """
        _, heads, _, *rest = cache.shape
        inner = (heads, self.page_size) if layout == "hnd" else (self.page_size, heads)
        storage = torch.empty(self.num_pages + 2, *inner, *rest, dtype=cache.dtype, device=cache.device)
        pool = fill_with_nan(storage)[1:-1]
        pool = pool if layout == "hnd" else pool.transpose(1, 2)
        as_bytes = (lambda x: x.view(torch.uint8)) if cache.element_size() == 1 else (lambda x: x)
        for sequence, length, pages in zip(as_bytes(cache), self.lens, self.pages, strict=True):
            at = torch.arange(length, device=cache.device)
            page = torch.tensor(pages, dtype=torch.long, device=cache.device)[at // self.page_size]
            as_bytes(pool)[page, :, at % self.page_size] = sequence[:, :length].transpose(0, 1)
        return pool


def quantise(cache, dtype, form, scale_dtype=torch.float32):
    """Stores `[B, Hkv, N, D]` as `dtype`: the stored numbers, and their scale in one of the forms `SCALES`."""
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    dims = {"number": (0, 1, 2, 3), "heads": (0, 2, 3), "sequences": (2, 3), "tokens": (3,)}[form]
    scale = (cache.float().abs().amax(dims, keepdim=True) / largest).to(scale_dtype)
    stored = (cache.float() / scale.float()).clamp(-largest, largest)
    stored = (stored.round() if dtype == torch.int8 else stored).to(dtype)
    if form == "number":
        return stored, float(scale)
    return stored, scale.flatten() if form == "heads" else scale.flatten(2).squeeze(-1) if form == "sequences" else (
        scale.squeeze(-1)
    )


def position_score(score, b, h, q_idx, kv_idx):
    """Another number for every (b, h, q_idx, kv_idx)."""
    return score + torch.sin(0.7 * b + 1.3 * h + 2.1 * q_idx + 3.7 * kv_idx)
