"""A KV cache in pages that sequences take as they grow and may share."""

from __future__ import annotations

import torch

from ..errors import FlexDecodeError
from .kv_cache import _Cache, _check_sizes


class OutOfPagesError(FlexDecodeError):
    """A `PagedKVCache` has too few free pages for the new tokens; nothing was changed."""


class PagedKVCache(_Cache):
    """A cache in pages of `page_size` tokens, which sequences take as they grow and may share.

    One or more sequences own a page. `fork` shares pages. A shared page that is not full is copied when one of its
    owners appends to it. That owner gets the copy.

    Args:
        batch: number of sequences B; all start empty.
        num_kv_heads: heads Hkv.
        num_pages: pages of all sequences together.
        page_size: tokens of a page.
        head_dim: D.
        v_head_dim: Dv, by default D.
        max_pages: pages that one sequence can have, by default all.
        dtype: of what is stored: float16, bfloat16, float32, or quantised: float8_e4m3fn, float8_e5m2, int8. New tokens
            of another dtype are rounded to it, also float32 ones to the default.
        device: of all tensors, by default PyTorch's.
        k_scale: of a quantised cache: a positive number (also a 0-d tensor), or float32 `[Hkv]`; by default every token
            gets the scale with which its largest element just fits.
        v_scale: likewise.

    Attributes:
        key: `[num_pages, Hkv, page_size, D]`.
        value: `[num_pages, Hkv, page_size, Dv]`.
        page_table: int32 `[B, max_pages]`, the pages of each sequence, on the device; entries past its length mean
            nothing.
        kv_lens: int32 `[B]`, tokens of each sequence, on the device.
        k_scale, v_scale: None without quantisation; else float32, value = stored * scale:
            `[num_pages, Hkv, page_size]`, one per token and head, or the given `[Hkv]`.
        lengths: tokens of each sequence, on the host; a copy.

    Raises:
        ValueError: an argument has an impossible value.
    """

    page_table: torch.Tensor
    _length_argument = "max_pages"

    def __init__(
        self,
        *,
        batch: int,
        num_kv_heads: int,
        num_pages: int,
        page_size: int,
        head_dim: int,
        v_head_dim: int | None = None,
        max_pages: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
    ) -> None:
        max_pages = num_pages if max_pages is None else max_pages
        sizes = {"batch": batch, "num_kv_heads": num_kv_heads, "num_pages": num_pages, "page_size": page_size}
        _check_sizes(**sizes, max_pages=max_pages)
        shape = (num_pages, num_kv_heads, page_size)
        super().__init__(shape, batch, max_pages * page_size, head_dim, v_head_dim, dtype, device, k_scale, v_scale)
        self.page_table = self._zeros(batch, max_pages)
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._owners = [0] * num_pages
        self._free = list(reversed(range(num_pages)))

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[2]

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence owns."""
        return len(self._free)

    def _room(self) -> str:
        return f", {len(self._free)} of {len(self._owners)} pages free"

    def fork(self, source: int, target: int) -> None:
        """Makes an empty sequence equal to another one. It shares all pages and copies nothing.

        To share only a prefix, `truncate` the target afterwards.

        Raises:
            ValueError: there is no such sequence, or the target is not empty.
        """
        self._refuse_capture("fork")
        self._check_sequence("source", source)
        self._check_sequence("target", target)
        if source == target or self._lengths[target]:
            raise ValueError(
                f"`target` must be another, empty sequence, but sequence {target} "
                + (f"has {self._lengths[target]} tokens: free({target}) first" if source != target else "is `source`")
            )
        for page in self._pages[source]:
            self._owners[page] += 1
        self._pages[target] = list(self._pages[source])
        self._lengths[target] = self._lengths[source]
        self.page_table[target].copy_(self.page_table[source])
        self.kv_lens[target].fill_(self._lengths[target])

    def _take_pages(self, counts: list[int]) -> None:
        copies = self._sequences_that_copy(counts)
        new = zip(self._lengths, counts, self._pages, strict=True)
        missing = [-(-(length + count) // self.page_size) - len(pages) for length, count, pages in new]
        needed = len(copies) + sum(missing)
        if needed > len(self._free):
            raise OutOfPagesError(
                f"{needed} more pages of {self.page_size} tokens are needed, but {len(self._free)} of "
                f"{len(self._owners)} are free, and nothing was changed; free() or truncate() a sequence, or make the "
                "cache with a larger `num_pages`"
            )
        changes: dict[int, int] = {}  # entries of the flat page table
        for sequence in copies:
            shared = self._pages[sequence].pop()
            self._owners[shared] -= 1
            page = self._add_page(sequence, changes)
            for tensor in (self.key, self.value, self.k_scale, self.v_scale):
                if tensor is not None and tensor.dim() > 1:
                    tensor[page].copy_(tensor[shared])
        for sequence, number in enumerate(missing):
            for _ in range(number):
                self._add_page(sequence, changes)
        if changes:
            entries = self._send(list(changes), torch.int64)
            self.page_table.view(-1).index_copy_(0, entries, self._send(list(changes.values()), torch.int32))

    def _sequences_that_copy(self, counts: list[int]) -> list[int]:
        """The sequences that need a copy because they append into a shared page. The page's last owner needs none."""
        found = []
        owners: dict[int, int] = {}
        for sequence, count in enumerate(counts):
            if count and self._lengths[sequence] % self.page_size:
                page = self._pages[sequence][-1]
                if owners.setdefault(page, self._owners[page]) > 1:
                    found.append(sequence)
                    owners[page] -= 1
        return found

    def _add_page(self, sequence: int, changes: dict[int, int]) -> int:
        """Gives a sequence a free page as its last page, and notes the change of the page table."""
        page = self._free.pop()
        self._owners[page] = 1
        changes[sequence * self.page_table.shape[1] + len(self._pages[sequence])] = page
        self._pages[sequence].append(page)
        return page

    def _shrink(self, sequence: int, length: int) -> None:
        super()._shrink(sequence, length)
        pages = self._pages[sequence]
        while len(pages) * self.page_size >= length + self.page_size:
            page = pages.pop()
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free.append(page)
