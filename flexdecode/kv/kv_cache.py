"""KV caches to decode with: contiguous, or in pages that sequences share.

>>> cache = PagedKVCache(batch=4, num_kv_heads=8, head_dim=128, num_pages=1024, page_size=16, device="cuda")
>>> cache.append(k, v)
>>> out = flex_decode(query, cache=cache)

The device holds keys, values, scales, lengths and the page table. The host holds the same lengths and knows which
sequences own each page. The host checks each change and never waits for the device.

**CUDA graphs.** A graph cannot record what the host does. A captured `append` records only the kernel. Before each
replay, `reserve` does the work of the host:

>>> cache.append(k, v)  # the prompt; this also compiles the kernel
>>> with torch.cuda.graph(graph):
...     cache.append(new_k, new_v)
...     out = flex_decode(query, cache=cache)
>>> for _ in range(100):
...     ...  # write into new_k, new_v and query
...     cache.reserve(1)  # or a list: [1, 0, 1, 1] appends nothing to sequence 1
...     graph.replay()

A captured append takes as many of its tokens as were reserved, so a replay without a reservation appends nothing. The
graph reads and writes the tensors of the cache, so keep the cache as long as the graph.

**Compiled regions.** In `torch.compile`, `append` does all that it does outside, the work of the host too.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Sequence
from numbers import Real

import torch

from ..analysis.analyze import MAX_KV_LEN
from ..call.device import may_keep_memory
from ..call.inputs import DTYPES, MAX_HEAD_DIM, QUANTISED
from .writing import Growing, Stored, append_rows, check_new

TENSORS = ("key", "value", "k_scale", "v_scale", "page_table", "kv_lens", "_limits", "_arrivals")  # of a cache

_numbers = itertools.count()
# The caches by their numbers, by which the custom op of a compiled region finds them.
_caches: weakref.WeakValueDictionary[int, _Cache] = weakref.WeakValueDictionary()


class _Cache:
    """What both caches share: the tensors, and how tokens are written into them.

    Attributes:
        key, value, kv_lens, page_table, k_scale, v_scale: on the device, as `flex_decode` takes them.
        lengths: tokens of each sequence, as the host knows them; a copy.
    """

    page_table: torch.Tensor | None = None
    _length_argument = "max_kv_len"  # the argument that bounds the length of a sequence

    def __init__(
        self,
        shape: tuple[int, int, int],
        batch: int,
        max_kv_len: int,
        head_dim: int,
        v_head_dim: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
        k_scale: float | torch.Tensor | None,
        v_scale: float | torch.Tensor | None,
    ) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("a cache cannot be made while a region is compiled: make it outside of the region")
        if max_kv_len >= MAX_KV_LEN:
            raise ValueError(f"a sequence must have fewer than {MAX_KV_LEN} tokens, got room for {max_kv_len}")
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        for name, size in (("head_dim", head_dim), ("v_head_dim", v_head_dim)):
            if type(size) is not int or not 1 <= size <= MAX_HEAD_DIM:
                raise ValueError(f"`{name}` must be an integer between 1 and {MAX_HEAD_DIM}, got {size!r}")
        if dtype not in (*DTYPES, *QUANTISED):
            known = ", ".join(str(x).removeprefix("torch.") for x in (*DTYPES, *QUANTISED))
            raise ValueError(f"`dtype` must be one of {known}, got {dtype}")
        self.key = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.value = torch.zeros(*shape, v_head_dim, dtype=dtype, device=device)
        self.k_scale = self._make_scale("k_scale", k_scale)
        self.v_scale = self._make_scale("v_scale", v_scale)
        self._lengths, self._max_kv_len = [0] * batch, max_kv_len
        self._take_number()
        self.kv_lens, self._limits, self._arrivals = self._zeros(batch), self._zeros(batch), self._zeros(batch)

    def __repr__(self) -> str:
        lengths, total = self._lengths, sum(self._lengths)
        tokens = f"lengths {lengths}" if len(lengths) <= 8 else f"{len(lengths)} sequences with {total} tokens"
        dtype = str(self.key.dtype).removeprefix("torch.")
        return f"<{type(self).__name__}: {dtype} on {self.key.device}, {tokens}{self._room()}>"

    def _room(self) -> str:
        return f", up to {self._max_kv_len} each"

    def _take_number(self) -> None:
        number = next(_numbers)
        self._number = torch.tensor(number, device="cpu")  # a Python number would be a constant of a compiled region
        _caches[number] = self

    def __setstate__(self, state: dict) -> None:  # of a copy
        self.__dict__.update(state)
        self._take_number()

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.key.device)

    def _make_scale(self, name: str, given: float | torch.Tensor | None) -> torch.Tensor | None:
        """None without quantisation, one scale per token and head, or the given ones as float32 `[Hkv]`."""
        heads, device = self.key.shape[1], self.key.device
        if self.key.dtype not in QUANTISED:
            if given is not None:
                raise ValueError(f"`{name}` is for caches in float8 or int8, but `dtype` is {self.key.dtype}")
            return None
        if given is None:
            return torch.ones(self.key.shape[:3], dtype=torch.float32, device=device)
        if isinstance(given, torch.Tensor) and given.dim():
            if given.dtype != torch.float32 or given.shape != (heads,):
                expected = f"a number or a float32 tensor [Hkv] = [{heads}]"
                raise ValueError(f"`{name}` must be {expected}, got {given.dtype} {list(given.shape)}")
            scales = given.detach().to(device, copy=True)
        else:
            given = given.item() if isinstance(given, torch.Tensor) else given
            is_number = isinstance(given, Real) and not isinstance(given, bool)
            scales = torch.tensor([float(given) if is_number else 0.0] * heads, dtype=torch.float32, device=device)
        if not ((scales > 0) & scales.isfinite()).all():
            raise ValueError(f"`{name}` must be positive and finite, got {given}")
        return scales

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, as the host knows them. The list is a copy: later appends do not change it."""
        return list(self._lengths)

    # --- Tokens -------------------------------------------------------------------------------------------------------

    def append(self, k: torch.Tensor, v: torch.Tensor, num_tokens: int | Sequence[int] | None = None) -> None:
        """Appends tokens to all sequences, on the current stream, in one kernel; returns at once.

        While a CUDA graph is captured, only the kernel is recorded; see the module's docstring and `reserve`.

        Args:
            k: `[B, Hkv, T, D]`, float16, bfloat16 or float32, any strides; rounded to the dtype of the cache.
            v: `[B, Hkv, T, Dv]`, likewise.
            num_tokens: how many of the T tokens each sequence takes, one number or one for each sequence; by default
                all. A sequence takes the first of the T tokens.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: shapes, dtypes, devices or numbers do not match, or a sequence would become too long.
            RuntimeError: the cache was made in inference mode and is used outside of it; the append is exported, or
                recorded in a CUDA graph by torch.compile.
            OutOfPagesError: a `PagedKVCache` has too few free pages.
        """
        if not torch.compiler.is_compiling():
            self._append(k, v, num_tokens)
            return
        counts = [num_tokens] * len(self.kv_lens) if isinstance(num_tokens, int) else num_tokens
        tensors = [getattr(self, name) for name in TENSORS]
        torch.ops.flexdecode.append(k, v, *tensors, self._number, counts)

    def _append(self, k: torch.Tensor, v: torch.Tensor, num_tokens: int | Sequence[int] | None) -> None:
        offered = check_new(k, v, self.key, self.value, len(self._lengths))
        self._check_writable()
        capturing = self._capturing()
        if capturing and num_tokens is not None:
            raise ValueError("a CUDA graph cannot keep `num_tokens`: give it to `reserve()` before each replay")
        counts = self._counts(offered if num_tokens is None else num_tokens)
        if max(counts) > offered:
            raise ValueError(f"`num_tokens` must be at most T = {offered} (from k), got {counts}")
        ragged = min(counts) < offered
        if not capturing:
            self._grow(counts)
            if ragged:
                self._send_limits()
        if max(counts) == 0:
            return
        append_rows(self._stored(), self._growing(), k, v, capturing or ragged, counts)

    def reserve(self, num_tokens: int | Sequence[int]) -> None:
        """Does the work of the host for one replay of a CUDA graph with a captured append.

        It checks that there is room, takes the pages and lengthens `lengths`. The next replay on the same stream then
        writes the tokens. An append outside of a graph does this by itself.

        Args:
            num_tokens: how many tokens the replay shall append: one number, or one for each sequence.

        Raises:
            TypeError: it is neither.
            ValueError: numbers are wrong, or a sequence would become too long; nothing was changed.
            OutOfPagesError: a `PagedKVCache` has too few free pages; nothing was changed.
        """
        self._refuse_capture("reserve")
        self._grow(self._counts(num_tokens))
        self._send_limits()

    def truncate(self, sequence: int, length: int) -> None:
        """Shortens a sequence to its first tokens, for example after draft tokens were rejected.

        Raises:
            ValueError: there is no such sequence, or it is shorter than `length`.
        """
        self._refuse_capture("truncate")
        self._check_sequence("sequence", sequence)
        if type(length) is not int or not 0 <= length <= self._lengths[sequence]:
            raise ValueError(
                f"`length` must be between 0 and {self._lengths[sequence]}, the length of sequence {sequence}, "
                f"got {length!r}"
            )
        self._shrink(sequence, length)
        for lengths in (self.kv_lens, self._limits):
            lengths[sequence].clamp_(max=length)

    def free(self, sequence: int) -> None:
        """Empties a sequence, so that its place and its pages can be used again."""
        self.truncate(sequence, 0)

    def reset(self) -> None:
        """Empties all sequences."""
        self._refuse_capture("reset")
        for sequence in range(len(self._lengths)):
            self._shrink(sequence, 0)
        for lengths in (self.kv_lens, self._limits):
            lengths.zero_()

    # --- On the host --------------------------------------------------------------------------------------------------

    def _grow(self, counts: list[int]) -> None:
        """Makes room for new tokens, or raises and changes nothing."""
        for sequence, (length, count) in enumerate(zip(self._lengths, counts, strict=True)):
            if length + count > self._max_kv_len:
                raise ValueError(
                    f"sequence {sequence} has {length} tokens, and {count} more do not fit: the cache holds "
                    f"{self._max_kv_len} tokens per sequence; truncate() or free() it, or make the cache with a larger "
                    f"`{self._length_argument}`"
                )
        self._take_pages(counts)
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]

    def _take_pages(self, counts: list[int]) -> None:
        """Takes the pages for new tokens, or raises and changes nothing; a contiguous cache has none."""

    def _shrink(self, sequence: int, length: int) -> None:
        self._lengths[sequence] = length

    def _counts(self, num_tokens: int | Sequence[int]) -> list[int]:
        """Checked numbers of new tokens, one for each sequence."""
        batch = len(self._lengths)
        if not isinstance(num_tokens, (int, list, tuple)):
            raise TypeError(f"`num_tokens` must be an integer or a list of {batch}, got {type(num_tokens).__name__}")
        counts = [num_tokens] * batch if isinstance(num_tokens, int) else list(num_tokens)
        if len(counts) != batch or any(type(n) is not int or n < 0 for n in counts):
            raise ValueError(f"`num_tokens` must have B = {batch} integers of at least 0, got {num_tokens}")
        return counts

    def _check_sequence(self, name: str, sequence: int) -> None:
        if type(sequence) is not int or not 0 <= sequence < len(self._lengths):
            raise ValueError(f"`{name}` must be between 0 and B - 1 = {len(self._lengths) - 1}, got {sequence!r}")

    def _capturing(self) -> bool:
        return self.key.is_cuda and torch.cuda.is_current_stream_capturing()

    def _check_writable(self) -> None:
        """Refuses tensors that PyTorch would refuse to write into. This check runs before anything is changed."""
        if self.kv_lens.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError("the cache was made in torch.inference_mode(): use it there, or make it outside")

    def _refuse_capture(self, name: str) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError(f"{name}() works on the host: call it outside of a compiled region")
        self._check_writable()
        if self._capturing():
            raise RuntimeError(f"{name}() works on the host: call it before the replay, not while a graph is captured")

    @contextlib.contextmanager
    def _replaced_by(self, tensors: Sequence[torch.Tensor | None]) -> Iterator[None]:
        """Lets other tensors take the place of the cache's own, in the order of `TENSORS`."""
        own = {name: getattr(self, name) for name in TENSORS}
        self.__dict__.update(zip(TENSORS, tensors, strict=True))
        try:
            yield
        finally:
            self.__dict__.update(own)

    # --- On the device ------------------------------------------------------------------------------------------------

    def _stored(self) -> Stored:
        return Stored(self.key, self.value, self.k_scale, self.v_scale)

    def _growing(self) -> Growing:
        return Growing(self.page_table, self.kv_lens, self._limits, self._arrivals)

    def _send(self, numbers: list[int], dtype: torch.dtype) -> torch.Tensor:
        """Makes a tensor of numbers on the device, without waiting for the device."""
        pinned = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=self.key.is_cuda)
        return pinned.to(self.key.device, non_blocking=True)

    def _send_limits(self) -> None:
        """Tells the kernel how long each sequence may become."""
        self._limits.copy_(self._send(self._lengths, torch.int32))


class KVCache(_Cache):
    """A contiguous cache: every sequence has its own place for `max_kv_len` tokens.

    Args:
        batch: number of sequences B; all start empty.
        num_kv_heads: heads Hkv.
        max_kv_len: tokens N that each sequence can hold.
        head_dim: D.
        v_head_dim: Dv, by default D.
        dtype: of what is stored: float16, bfloat16, float32, or quantised: float8_e4m3fn, float8_e5m2, int8. New tokens
            of another dtype are rounded to it, also float32 ones to the default.
        device: of all tensors, by default PyTorch's.
        k_scale: of a quantised cache: a positive number (also a 0-d tensor), or float32 `[Hkv]`; by default every token
            gets the scale with which its largest element just fits.
        v_scale: likewise.

    Attributes:
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, Dv]`.
        kv_lens: int32 `[B]`, tokens of each sequence, on the device.
        page_table: None.
        k_scale, v_scale: None without quantisation; else float32, value = stored * scale: `[B, Hkv, N]`, one per token
            and head, or the given `[Hkv]`.
        lengths: tokens of each sequence, on the host; a copy.

    Raises:
        ValueError: an argument has an impossible value.
    """

    def __init__(
        self,
        *,
        batch: int,
        num_kv_heads: int,
        max_kv_len: int,
        head_dim: int,
        v_head_dim: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
    ) -> None:
        _check_sizes(batch=batch, num_kv_heads=num_kv_heads, max_kv_len=max_kv_len)
        shape = (batch, num_kv_heads, max_kv_len)
        super().__init__(shape, batch, max_kv_len, head_dim, v_head_dim, dtype, device, k_scale, v_scale)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {size!r}")


def append_in_region(
    k: torch.Tensor, v: torch.Tensor, tensors: Sequence[torch.Tensor | None], number: int, num_tokens: list[int] | None
) -> None:
    """Appends to the cache of a number. `tensors`, of `TENSORS`, take the place of its own: they may be copies of them.

    Raises:
        RuntimeError: there is no such cache, or torch.compile records a CUDA graph.
    """
    cache = _caches.get(number)
    if cache is None:
        raise RuntimeError("the cache of this compiled region is gone: keep it as long as the region is called")
    if cache._capturing() and not may_keep_memory():
        raise RuntimeError(
            "torch.compile records a CUDA graph of an append, and its replays tell the host nothing: append outside of "
            'the region, or compile without mode="reduce-overhead"'
        )
    with cache._replaced_by(tensors):
        cache._append(k, v, num_tokens)
