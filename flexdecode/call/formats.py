"""How keys and values lie in memory: one object for each kind of cache.

A kind says which shapes it takes, how long a sequence may be, which templates its kernels need, and how PyTorch
operations read it. A call with a page table is `PAGED`, one with `cu_seqlens_k` is `PACKED`. Each of these tensors is
the table of its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .packing import rows_of_sequences


class Piece(NamedTuple):
    """A part of some slots of a cache [R, Hkv, n, ...]."""

    sequences: slice
    heads: slice
    slots: slice


WHOLE = Piece(slice(None), slice(None), slice(None))
Gather = Callable[[torch.Tensor, Piece], torch.Tensor]


class Contiguous:
    """`[B, Hkv, N, D]`: every sequence has its own rows, or all sequences share the same rows (B = 1).

    Attributes:
        form, scale_form: shapes of keys and values, and of scales per token, in words.
        sizes, capacity_form, limit: words for errors.
        templates: template files whose functions take the place of those of `decode.py`.
        table: the argument that says where the keys of a sequence lie, if the call has it.
        has_matrices: whether tensor descriptors can show blocks of keys, by `rectangle` of the template.
    """

    form = "[B, Hkv, N, {}]"
    scale_form = "[B, Hkv, N]"
    sizes = "Hkv = {1} and N = {2} (from key)"
    capacity_form = "N = {} (from key)"
    limit = "`key` must have"
    templates: tuple[str, ...] = ()
    table = "page_table"
    has_matrices = True

    def owners(self, batch: int, key: torch.Tensor) -> int:
        """Size that the first dimension has if the sequences do not share the cache."""
        return batch

    def capacity(self, key: torch.Tensor, table: torch.Tensor | None) -> int:
        """The longest sequence that the cache can hold."""
        return key.shape[2]

    def page_size(self, key: torch.Tensor) -> int:
        """Tokens of a page; 0 if there are no pages."""
        return 0

    def shown_shape(self, tensor: torch.Tensor) -> list[int]:
        """The shape of keys or values as the caller knows it."""
        return list(tensor.shape)

    def types(self, pointer: Any) -> tuple:
        """Triton types of the kernels' argument `page_table`; `pointer` is the type of the table's address."""
        return ()

    def arguments(self, key: torch.Tensor, table: torch.Tensor | None, at: Callable) -> tuple:
        """The argument `page_table` itself; `at` gives what a kernel takes for a tensor."""
        return ()

    def gather(
        self,
        key: torch.Tensor,
        table: torch.Tensor | None,
        slots: range,
        read: torch.Tensor | None,
        check: bool,
        owner: torch.Tensor | None = None,
    ) -> Gather:
        """Makes a function that takes `key`, `value` or scales per token and gives a piece of the rows of some slots.

        Args:
            key: of the call.
            table: what says where the keys of each sequence lie.
            slots: n of them, without a gap.
            read: bool that broadcasts to [R, Hkv, n], which of them are read; None if all are.
            check: whether to refuse tables that lead out of the cache; on a CPU they are always refused.
            owner: the sequence that each of the R results is for, int64 [R]. By default each sequence has one.

        Returns:
            The function. A piece of the whole is [R or 1, Hkv, n, ...].
        """

        def rows(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
            part = slots[piece.slots]
            found = tensor if len(part) == tensor.shape[2] else tensor.narrow(2, part.start, len(part))
            if tensor.shape[0] == 1:
                return found if piece is WHOLE else found[:, piece.heads]
            if owner is None:
                return found if piece is WHOLE else found[piece.sequences, piece.heads]
            return found[:, piece.heads][owner[piece.sequences]]

        return rows


class Paged(Contiguous):
    """`[num_pages, Hkv, page_size, D]`, and a table that lists the pages of each sequence."""

    form = "[num_pages, Hkv, page_size, {}]"
    scale_form = "[num_pages, Hkv, page_size]"
    sizes = "num_pages = {0}, Hkv = {1} and page_size = {2} (from key)"
    capacity_form = "max_pages * page_size = {} (from page_table)"
    limit = "`page_table` must reach"
    templates = ("kv_paged.py",)

    def owners(self, batch: int, key: torch.Tensor) -> int:
        """The number of all pages."""
        return key.shape[0]

    def capacity(self, key: torch.Tensor, table: torch.Tensor | None) -> int:
        """The number of tokens in all the pages that one row of the table can list."""
        assert table is not None
        return key.shape[2] * table.shape[1] if key.shape[0] else 0

    def page_size(self, key: torch.Tensor) -> int:
        """Tokens of a page."""
        return key.shape[2]

    def types(self, pointer: Any) -> tuple:
        """Types of the table's address, its stride over sequences, and the number of all pages."""
        return (pointer, "i64", "i32")

    def arguments(self, key: torch.Tensor, table: torch.Tensor | None, at: Callable) -> tuple:
        """As `types` says."""
        assert table is not None
        return (at(table), table.stride(0), key.shape[0])

    def gather(
        self,
        key: torch.Tensor,
        table: torch.Tensor | None,
        slots: range,
        read: torch.Tensor | None,
        check: bool,
        owner: torch.Tensor | None = None,
    ) -> Gather:
        """As for a contiguous cache."""
        assert table is not None
        table = table if owner is None else table[owner]
        page_size, num_pages = key.shape[2], key.shape[0]
        places = torch.arange(slots.start, slots.stop, device=table.device)
        page, row = places // page_size, places % page_size
        pages = table[:, page]
        pages = (pages if read is None else torch.where(read.any(1), pages, 0)).long()
        wrong = (pages < 0) | (pages >= num_pages)
        if (check or pages.device.type == "cpu") and wrong.any():
            found = int(pages[wrong][0])
            raise ValueError(f"`page_table` names page {found} within a sequence, but `key` has {num_pages} pages")
        pages = torch.where(wrong, 0, pages)  # as in the kernel, which cannot raise

        def rows(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
            found = tensor[:, piece.heads]
            return found[pages[piece.sequences, piece.slots], :, row[piece.slots]].transpose(1, 2)

        return rows


class Packed(Contiguous):
    """`[Tk, Hkv, D]`: the keys of all sequences one after another. The table is `cu_seqlens_k`.

    Everything below the checks sees the view `[1, Hkv, Tk, D]`: one cache, in which each sequence has a part.
    """

    form = "[Tk, Hkv, {}]"
    sizes = "Hkv = {1} and Tk = {2} (from key)"
    capacity_form = "Tk = {} (from key)"
    templates = ("kv_packed.py",)
    has_matrices = False
    table = "cu_seqlens_k"

    def owners(self, batch: int, key: torch.Tensor) -> int:
        """0: no sequence has an index of its own in the view, so its stride counts as 0."""
        return 0

    def shown_shape(self, tensor: torch.Tensor) -> list[int]:
        """[Tk, Hkv, D]."""
        _, heads, rows, width = tensor.shape
        return [rows, heads, width]

    def types(self, pointer: Any) -> tuple:
        """Type of the address of `cu_seqlens_k`. Its entries are clamped to the capacity, which kernels always take."""
        return (pointer,)

    def arguments(self, key: torch.Tensor, table: torch.Tensor | None, at: Callable) -> tuple:
        """As `types` says."""
        return (at(table),)

    def gather(
        self,
        key: torch.Tensor,
        table: torch.Tensor | None,
        slots: range,
        read: torch.Tensor | None,
        check: bool,
        owner: torch.Tensor | None = None,
    ) -> Gather:
        """As for a contiguous cache; there are no scales per token."""
        assert table is not None and owner is not None
        start, _ = rows_of_sequences(table, key.shape[2])
        # What is not read may lie past the last key.
        places = start[owner][:, None] + torch.arange(slots.start, slots.stop, device=table.device)
        places = places if read is None else torch.where(read.any(1), places, 0)

        def rows(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
            found = tensor[0, piece.heads].transpose(0, 1)
            return found[places[piece.sequences, piece.slots]].transpose(1, 2)

        return rows


CONTIGUOUS, PAGED, PACKED = Contiguous(), Paged(), Packed()
