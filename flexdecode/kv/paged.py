"""A KV cache in pages that sequences take as they grow and may share, for one layer or for all layers of a model.

>>> cache = PagedKVCache(batch=4, num_layers=32, num_kv_heads=8, head_dim=128, num_pages=1024, page_size=16)
>>> cache.reserve(1)  # once for each step
>>> for i in range(32):
...     cache.layer(i).append(k[i], v[i])
...     out = flex_decode(query[i], cache=cache.layer(i))
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import FlexDecodeError
from .cache import Cache, check_sizes
from .layers import CacheLayer, LayerTensors, append_to_slots
from .steps import send


class OutOfPagesError(FlexDecodeError):
    """A `PagedKVCache` has too few free pages for the new tokens; nothing was changed."""


class PagedKVCache(Cache):
    """A cache in pages of `page_size` tokens, which sequences take as they grow and may share.

    One or more sequences own a page. `fork` shares pages. A shared page that is not full is copied when one of its
    owners appends to it. That owner gets the copy.

    With `num_layers`, the cache has the keys and values of all layers of a model, and one page table and one set of
    lengths for all of them. A step then has two parts: `reserve` of the cache, once, and `append` of each `layer`.

    Args:
        batch: number of sequences B; all start empty.
        num_kv_heads: heads Hkv.
        num_pages: pages of all sequences together.
        page_size: tokens of a page.
        head_dim: D.
        v_head_dim: Dv, by default D.
        num_layers: layers L of the model; None for one layer, which is the cache itself.
        latent: whether the value of a token is the first Dv columns of its key (multi-head latent attention, MLA).
            Memory is kept once, and `append` takes no v.
        max_pages: pages that one sequence can have, by default all.
        dtype: of what is stored: float16, bfloat16, float32, or quantised: float8_e4m3fn, float8_e5m2, int8. New tokens
            of another dtype are rounded to it, also float32 ones to the default.
        device: of all tensors, by default PyTorch's.
        k_scale: of a quantised cache: a positive number (also a 0-d tensor), or float32 `[Hkv]` or `[L, Hkv]`; by
            default every token gets the scale with which its largest element just fits.
        v_scale: likewise; not with `latent`.

    Attributes:
        key: `[num_pages, Hkv, page_size, D]`; with layers, `[L, num_pages, Hkv, page_size, D]`.
        value: the same with Dv; with `latent`, a view of `key`.
        page_table: int32 `[B, max_pages]`, the pages of each sequence, on the device; entries past its length mean
            nothing.
        kv_lens: int32 `[B]`, tokens of each sequence, on the device.
        k_scale, v_scale: None without quantisation; else float32, value = stored * scale:
            `[num_pages, Hkv, page_size]`, one per token and head, or the given `[Hkv]`; with layers, L of these.
        lengths: tokens of each sequence, on the host; a copy.
        num_layers: as given.

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
        num_layers: int | None = None,
        latent: bool = False,
        max_pages: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
    ) -> None:
        max_pages = num_pages if max_pages is None else max_pages
        sizes = {"batch": batch, "num_kv_heads": num_kv_heads, "num_pages": num_pages, "page_size": page_size}
        layers = {} if num_layers is None else {"num_layers": num_layers}
        check_sizes(**sizes, **layers, max_pages=max_pages)
        if num_pages * page_size >= 1 << 31:
            raise ValueError(f"the pages must hold fewer than 2**31 tokens, got {num_pages} pages of {page_size}")
        self.num_layers = num_layers
        self._layers: tuple[CacheLayer, ...] = ()
        shape = (*layers.values(), num_pages, num_kv_heads, page_size)
        longest = max_pages * page_size
        super().__init__(shape, batch, longest, head_dim, v_head_dim, latent, dtype, device, k_scale, v_scale)
        self.page_table = self._zeros(batch, max_pages)
        self._pages: list[list[int]] = [[] for _ in range(batch)]
        self._owners = [0] * num_pages
        self._free = list(reversed(range(num_pages)))
        self._make_views()

    def _make_views(self) -> None:
        super()._make_views()
        if self.num_layers is None or "page_table" not in self.__dict__:
            return
        self.kv_lens = self._step.ends
        latent = self._latent_width is not None
        self._layers = tuple(CacheLayer(self, i, self._tensors_of_layer(i), latent) for i in range(self.num_layers))

    def _tensors_of_layer(self, i: int) -> LayerTensors:
        k_scale = None if self.k_scale is None else self.k_scale[i]
        of_values = self.v_scale if self.v_scale is not self.k_scale else None
        v_scale = k_scale if of_values is None else of_values[i]
        return LayerTensors(self.key[i], self.value[i], k_scale, v_scale, self.page_table, self.kv_lens)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.key.shape[-2]

    @property
    def num_free_pages(self) -> int:
        """Pages that no sequence owns."""
        return len(self._free)

    def _room(self) -> str:
        return f", {len(self._free)} of {len(self._owners)} pages free"

    @property
    def cu_seqlens_q(self) -> torch.Tensor:
        """int32 `[B + 1]`, on the device: where the tokens of each sequence begin in the packed queries of this step.

        `reserve` sets it. `flex_decode(query, cache=cache.layer(i), cu_seqlens_q=cache.cu_seqlens_q)` is then the call
        for packed queries `[T, Hq, D]`. The tensor stays in the same memory.

        Raises:
            RuntimeError: the cache has no layers, and so no `reserve` that begins a step.
        """
        if self.num_layers is None:
            raise RuntimeError("a cache of one layer has no `cu_seqlens_q`: make it with `num_layers=1`")
        return self._step.cu_seqlens

    def layer(self, index: int) -> CacheLayer:
        """A layer of a cache with `num_layers`, for `flex_decode(query, cache=...)` and `append`.

        Each call gives the same object.

        Raises:
            TypeError: `index` is no integer.
            ValueError: there is no such layer.
        """
        if type(index) is not int:
            raise TypeError(f"`index` must be an integer, got {type(index).__name__}")
        if self.num_layers is None:
            raise ValueError("this cache is its only layer itself: make it with `num_layers` to have layers")
        if not 0 <= index < self.num_layers:
            raise ValueError(f"`index` must be between 0 and num_layers - 1 = {self.num_layers - 1}, got {index}")
        return self._layers[index]

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor | None = None,
        num_tokens: int | Sequence[int] | None = None,
        *,
        sequence: int | None = None,
        slot_mapping: torch.Tensor | None = None,
    ) -> None:
        """As `KVCache.append`, for a cache of one layer, and to slots.

        Args:
            k: `[B, Hkv, T, D]`, packed `[T, Hkv, D]`, or `[1, Hkv, T, D]` of one sequence.
            v: likewise with Dv; None if the cache has latents.
            num_tokens: how many tokens each sequence takes, as in `KVCache.append`.
            sequence: the only sequence that takes tokens.
            slot_mapping: int32 or int64 `[T]`, slots of the pages, page * page_size + offset, for packed tokens. A slot
                that is negative or beyond the pages is skipped. This only writes, also while a CUDA graph is captured:
                the caller keeps the books, and lengths and pages of this cache do not change.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: as for `KVCache.append`; or the cache has layers.
            RuntimeError: as for `KVCache.append`.
            OutOfPagesError: there are too few free pages.
        """
        if self.num_layers is not None:
            raise ValueError(
                "this cache has layers: call reserve() once for each step, and then append() of cache.layer(i)"
            )
        if slot_mapping is None:
            super().append(k, v, num_tokens, sequence=sequence)
        elif torch.compiler.is_compiling():
            torch.ops.flexdecode.write_kv(k, v, *self._stored()[:4], slot_mapping)
        else:
            given = 0 if num_tokens is not None else sequence
            append_to_slots(self._stored(), k, v, slot_mapping, given)

    def reserve(self, num_tokens: int | Sequence[int], *, sequence: int | None = None) -> None:
        """Makes room for the tokens of one step, and says to the device where they go; returns at once.

        It checks that there is room, takes pages and lengthens `lengths`. In a cache with layers it begins a step: it
        sets `kv_lens` and `cu_seqlens_q`, in one small copy, and then every `layer` appends the tokens. In a cache of
        one layer it does the work of the host for one replay of a CUDA graph with a captured append.

        All layers have the reserved tokens from then on, written or not. So append to every layer that attends, before
        the next `reserve`: a place that nobody wrote holds what an earlier sequence left there. `truncate` takes back a
        step that is given up. In a cache with layers an error of `reserve` ends the step before, so that no append
        writes there again; lengths and pages do not change.

        Args:
            num_tokens: how many tokens the step has: one number for all sequences, or one for each.
            sequence: the only sequence that takes tokens. Then `num_tokens` is one number.

        Raises:
            TypeError: it is neither.
            ValueError: numbers are wrong, or a sequence would become too long; nothing was changed.
            RuntimeError: a CUDA graph is captured, or a region compiled; or the cache has one layer, and no graph has
                captured an append of it.
            OutOfPagesError: there are too few free pages; nothing was changed.
        """
        if self.num_layers is None:
            super().reserve(num_tokens, sequence=sequence)
            return
        self._refuse_capture("reserve")
        try:
            counts = self._counts(num_tokens, sequence)
            self._grow(counts)
        except Exception:
            self._step.end()  # otherwise an append would write its tokens to the places of the step before
            raise
        self._step.begin(self._lengths, counts)

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
        if self.num_layers is not None:
            self._step.end()

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
            for pages in self._tensors_in_pages():
                pages[page].copy_(pages[shared])  # of all layers at once
        for sequence, number in enumerate(missing):
            for _ in range(number):
                self._add_page(sequence, changes)
        if changes:
            entries = send(list(changes), torch.int64, self.device)
            self.page_table.view(-1).index_copy_(0, entries, send(list(changes.values()), torch.int32, self.device))

    def _tensors_in_pages(self) -> list[torch.Tensor]:
        """What a page consists of: keys, values that are no latents, scales of tokens. The pages come first."""
        latent, first = self._latent_width is not None, 0 if self.num_layers is None else 1
        tensors = [self.key, self.k_scale] if latent else [self.key, self.value, self.k_scale, self.v_scale]
        return [x.movedim(first, 0) for x in tensors if x is not None and x.dim() > first + 1]

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

    def _shorten(self, sequences: int | slice, length: int) -> None:
        super()._shorten(sequences, length)
        if self.num_layers is not None:
            self._step.end()
