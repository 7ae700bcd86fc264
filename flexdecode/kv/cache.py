"""What the caches have in common: the books of the host, and how tokens are written."""

from __future__ import annotations

import contextlib
import copy
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from ..call.device import may_keep_memory
from ..call.inputs import DTYPES, MAX_HEAD_DIM, QUANTISED
from .scales import make_scale
from .steps import Step, check_capacity, check_tokens, send
from .writing import Growing, Reserved, Stored, append_rows, check_new, is_packed, write_reserved

if TYPE_CHECKING:
    from typing_extensions import Self  # Python 3.11 has it in `typing`

TENSORS = ("key", "value", "k_scale", "v_scale", "page_table", "kv_lens", "_limits", "_arrivals")  # of a cache

_numbers = itertools.count()
# The caches by their numbers, by which the custom op of a compiled region finds them.
_caches: weakref.WeakValueDictionary[int, Cache] = weakref.WeakValueDictionary()


class Cache:
    """What both caches share: the tensors, and how tokens are written into them.

    Attributes:
        key, value, kv_lens, page_table, k_scale, v_scale: on the device, as `flex_decode` takes them.
        lengths: tokens of each sequence, as the host knows them; a copy.
    """

    page_table: torch.Tensor | None = None
    num_layers: int | None = None
    _captured = False  # whether a CUDA graph may append
    _length_argument = "max_kv_len"  # the argument that bounds the length of a sequence
    _latent_width: int | None = None  # Dv, if values are the first columns of keys

    def __init__(
        self,
        shape: tuple[int, ...],
        batch: int,
        max_kv_len: int,
        head_dim: int,
        v_head_dim: int | None,
        latent: bool,
        dtype: torch.dtype,
        device: torch.device | str | None,
        k_scale: float | torch.Tensor | None,
        v_scale: float | torch.Tensor | None,
    ) -> None:
        if torch.compiler.is_compiling():
            raise RuntimeError("a cache cannot be made while a region is compiled: make it outside of the region")
        check_capacity(max_kv_len)
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        for name, size in (("head_dim", head_dim), ("v_head_dim", v_head_dim)):
            if type(size) is not int or not 1 <= size <= MAX_HEAD_DIM:
                raise ValueError(f"`{name}` must be an integer between 1 and {MAX_HEAD_DIM}, got {size!r}")
        if latent and (v_head_dim > head_dim or v_scale is not None):
            wrong = "`v_scale`, because `k_scale` is that of both" if v_scale is not None else f"Dv = {v_head_dim}"
            raise ValueError(
                f"with `latent`, values are the first of D = {head_dim} columns of keys: there is no {wrong}"
            )
        if dtype not in (*DTYPES, *QUANTISED):
            known = ", ".join(str(x).removeprefix("torch.") for x in (*DTYPES, *QUANTISED))
            raise ValueError(f"`dtype` must be one of {known}, got {dtype}")
        self.key = torch.zeros(*shape, head_dim, dtype=dtype, device=device)
        self.k_scale = make_scale("k_scale", k_scale, self.key)
        if latent:
            self._latent_width = v_head_dim
        else:
            self.value = torch.zeros(*shape, v_head_dim, dtype=dtype, device=device)
            self.v_scale = make_scale("v_scale", v_scale, self.key)
        self._lengths, self._max_kv_len = [0] * batch, max_kv_len
        self._take_number()
        self.kv_lens, self._limits, self._arrivals = self._zeros(batch), self._zeros(batch), self._zeros(batch)
        self._step = Step(batch, self.key.device)
        self._make_views()

    def _make_views(self) -> None:
        """Makes what is a view of the other tensors: values that are latents."""
        if self._latent_width is not None:
            self.value, self.v_scale = self.key[..., : self._latent_width], self.k_scale

    def __repr__(self) -> str:
        lengths, total = self._lengths, sum(self._lengths)
        tokens = f"lengths {lengths}" if len(lengths) <= 8 else f"{len(lengths)} sequences with {total} tokens"
        dtype = str(self.key.dtype).removeprefix("torch.")
        tensors = {x.data_ptr(): x for x in (self.value, self.key, self.k_scale, self.v_scale) if x is not None}
        size = f"{sum(x.nbytes for x in tensors.values()) / 1e6:.1f} MB"
        layers = "" if self.num_layers is None else f"{self.num_layers} layers, "
        return f"<{type(self).__name__}: {layers}{dtype} on {self.key.device}, {size}, {tokens}{self._room()}>"

    def _room(self) -> str:
        return f", up to {self._max_kv_len} each"

    def _take_number(self) -> None:
        number = next(_numbers)
        self._number = torch.tensor(number, device="cpu")  # a Python number would be a constant of a compiled region
        _caches[number] = self

    def __getstate__(self) -> dict:
        views = ["_layers", "_captured"]  # no graph writes into a copy
        if self._latent_width is not None:
            views += ["value", "v_scale"]
        if self.num_layers is not None:
            views.append("kv_lens")
        return {name: x for name, x in self.__dict__.items() if name not in views}

    def __setstate__(self, state: dict) -> None:  # of a copy
        self.__dict__.update(state)
        self._make_views()
        self._take_number()

    def to(self, device: torch.device | str) -> Self:
        """A cache with the same content on another device. Each of the two has its own tensors, lengths and pages.

        Returns:
            A new cache; this one if it is on the device already.

        Raises:
            RuntimeError: a CUDA graph is captured, or a region compiled.
        """
        self._refuse_capture("to")
        place = torch.empty(0, device=device).device
        if place == self.device:
            return self
        moved = type(self).__new__(type(self))
        moved.__setstate__({name: _moved(x, place) for name, x in self.__getstate__().items()})
        return moved

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.key.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.key.dtype

    @property
    def batch(self) -> int:
        """The number of sequences B."""
        return len(self._lengths)

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=self.key.device)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, as the host knows them. The list is a copy: later appends do not change it."""
        return list(self._lengths)

    # --- Tokens -------------------------------------------------------------------------------------------------------

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor | None = None,
        num_tokens: int | Sequence[int] | None = None,
        *,
        sequence: int | None = None,
    ) -> None:
        """Appends tokens, on the current stream, in one kernel; returns at once.

        While a CUDA graph is captured, only the kernel is recorded; see `reserve`. This is
        for tokens of all sequences `[B, Hkv, T, D]`.

        Args:
            k: `[B, Hkv, T, D]`, float16, bfloat16 or float32, any strides; rounded to the dtype of the cache. Or the
                tokens of all sequences one after another, packed: `[T, Hkv, D]`. Rows after the last one are ignored.
            v: `[B, Hkv, T, Dv]` or `[T, Hkv, Dv]`, likewise; None if the cache has latents.
            num_tokens: how many tokens each sequence takes, one number or one for each sequence; by default all T. A
                sequence takes the first of its T tokens. Required for packed tokens.
            sequence: the only sequence that takes tokens, from `[1, Hkv, T, D]` or `[T, Hkv, D]`. Then `num_tokens` is
                one number.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: shapes, dtypes, devices or numbers do not match, or a sequence would become too long.
            RuntimeError: the cache was made in inference mode and is used outside of it; the append is exported, or
                recorded in a CUDA graph by torch.compile.
            OutOfPagesError: a `PagedKVCache` has too few free pages.
        """
        if not torch.compiler.is_compiling():
            self._append(k, v, num_tokens, sequence)
            return
        as_list = isinstance(num_tokens, int) and sequence is None
        counts = [num_tokens] * len(self.kv_lens) if as_list else num_tokens
        if isinstance(counts, int):
            counts = [counts]
        tensors = [getattr(self, name) for name in TENSORS]
        if self._latent_width is not None:
            tensors[1] = tensors[3] = None
        torch.ops.flexdecode.append(k, v, *tensors, self._number, counts, sequence)

    def _append(
        self, k: torch.Tensor, v: torch.Tensor | None, num_tokens: int | Sequence[int] | None, sequence: int | None
    ) -> None:
        if sequence is not None or is_packed(k):
            self._append_packed(k, v, num_tokens, sequence)
            return
        stored = self._stored()
        offered = check_new(k, v, stored.key, stored.value, len(self._lengths))
        self._check_writable()
        capturing = self._capturing()
        if capturing and num_tokens is not None:
            raise ValueError("a CUDA graph cannot keep `num_tokens`: give it to `reserve()` before each replay")
        self._captured = self._captured or capturing
        counts = self._counts(offered if num_tokens is None else num_tokens)
        if max(counts) > offered:
            raise ValueError(f"`num_tokens` must be at most T = {offered} (from k), got {counts}")
        ragged = min(counts) < offered
        if not capturing:
            self._grow(counts)
            if ragged:
                self._send_limits()
        if max(counts) > 0:
            append_rows(stored, self._growing(), k, v, capturing or ragged, counts)

    def _append_packed(
        self, k: torch.Tensor, v: torch.Tensor | None, num_tokens: int | Sequence[int] | None, sequence: int | None
    ) -> None:
        """Appends tokens that follow one another, or those of one sequence."""
        stored = self._stored()
        packed = is_packed(k)
        offered = check_new(k, v, stored.key, stored.value, None if packed else 1)
        self._check_writable()
        if self._capturing():
            raise ValueError(
                "a CUDA graph records an append of [B, Hkv, T, D] only; in PagedKVCache(num_layers=1), of all forms"
            )
        if sequence is None and num_tokens is None:
            raise ValueError("packed tokens need `num_tokens`: how many of the T tokens each sequence takes")
        counts = self._counts(offered if num_tokens is None else num_tokens, sequence)
        check_tokens(offered, counts, packed, sequence)
        self._grow(counts)
        self._step.begin(self._lengths, counts)
        self.kv_lens.copy_(self._step.ends)
        reserved = Reserved(self.page_table, self._step.starts, self._step.ends, self._step.cu_seqlens)
        write_reserved(stored, reserved, k, v, lambda: None, sequence)

    def reserve(self, num_tokens: int | Sequence[int], *, sequence: int | None = None) -> None:
        """Does the work of the host for one replay of a CUDA graph with a captured append.

        It checks that there is room, takes the pages and lengthens `lengths`. The next replay on the same stream then
        writes the tokens. An append outside of a graph does this by itself: between `reserve` and its replay it would
        lengthen the sequences once more, and `lengths` and `kv_lens` would differ from then on. `truncate` takes back
        a reservation that is given up.

        Args:
            num_tokens: how many tokens the replay shall append: one number, or one for each sequence.
            sequence: the only sequence that takes tokens. Then `num_tokens` is one number.

        Raises:
            TypeError: it is neither.
            ValueError: numbers are wrong, or a sequence would become too long; nothing was changed.
            RuntimeError: no graph has captured an append of this cache; or a graph is captured, or a region compiled.
            OutOfPagesError: a `PagedKVCache` has too few free pages; nothing was changed.
        """
        self._refuse_capture("reserve")
        if not self._captured:
            raise RuntimeError(
                "no CUDA graph has captured an append of this cache, so nothing would write what is reserved: call "
                "append() alone, which reserves by itself, or make PagedKVCache(num_layers=1) and append to layer(0)"
            )
        self._grow(self._counts(num_tokens, sequence))
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
        self._shorten(sequence, length)

    def free(self, sequence: int) -> None:
        """Empties a sequence, so that its place and its pages can be used again."""
        self.truncate(sequence, 0)

    def reset(self) -> None:
        """Empties all sequences."""
        self._refuse_capture("reset")
        for sequence in range(len(self._lengths)):
            self._shrink(sequence, 0)
        self._shorten(slice(None), 0)

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
        self._lengths[:] = [length + count for length, count in zip(self._lengths, counts, strict=True)]

    def _take_pages(self, counts: list[int]) -> None:
        """Takes the pages for new tokens, or raises and changes nothing; a contiguous cache has none."""

    def _shrink(self, sequence: int, length: int) -> None:
        self._lengths[sequence] = length

    def _counts(self, num_tokens: int | Sequence[int], sequence: int | None = None) -> list[int]:
        """Checked numbers of new tokens, one for each sequence. Those of other sequences than a given one are 0."""
        batch = len(self._lengths)
        if sequence is not None:
            self._check_sequence("sequence", sequence)
            if type(num_tokens) is not int or num_tokens < 0:
                raise ValueError(f"`num_tokens` of one sequence must be an integer of at least 0, got {num_tokens!r}")
            return [num_tokens if b == sequence else 0 for b in range(batch)]
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
        self._make_views()
        try:
            yield
        finally:
            self.__dict__.update(own)

    # --- On the device ------------------------------------------------------------------------------------------------

    def _stored(self) -> Stored:
        if self._latent_width is not None:
            return Stored(self.key, None, self.k_scale, None)
        return Stored(self.key, self.value, self.k_scale, self.v_scale)

    def _growing(self) -> Growing:
        return Growing(self.page_table, self.kv_lens, self._limits, self._arrivals)

    def _send_limits(self) -> None:
        """Tells the kernel how long each sequence may become."""
        self._limits.copy_(send(self._lengths, torch.int32, self.device))

    def _shorten(self, sequences: int | slice, length: int) -> None:
        """Shortens sequences on the device."""
        for lengths in (self.kv_lens, self._limits):
            lengths[sequences].clamp_(max=length)


def check_sizes(**sizes: int) -> None:
    """Refuses sizes that are no positive integers.

    Raises:
        ValueError: one is not.
    """
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {size!r}")


def _moved(x: object, device: torch.device) -> object:
    """A copy of an attribute of a cache, with tensors on a device."""
    if isinstance(x, torch.Tensor):
        return x.to(device, copy=True)
    return x.to(device) if isinstance(x, Step) else copy.deepcopy(x)


def append_in_region(
    k: torch.Tensor,
    v: torch.Tensor | None,
    tensors: Sequence[torch.Tensor | None],
    number: int,
    num_tokens: list[int] | None,
    sequence: int | None,
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
        of_one = None if num_tokens is None or sequence is None else num_tokens[0]
        cache._append(k, v, num_tokens if of_one is None else of_one, sequence)
