"""`flex_decode`, `prepare` and `explain`: from arguments to a plan that is known or made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from .call.device import DeviceFacts
from .call.inputs import DecodeOptions, Inputs
from .call.signature import NO_AUX, ONLY_LSE, Aux
from .codegen.kernels import forget_kernels
from .errors import IN_REGION
from .kv.kv_cache import KVCache
from .kv.layers import CacheLayer
from .kv.paged import PagedKVCache
from .kv.reading import read_cache
from .memos import CacheInfo, counters, forget_memos, lock, reset, snapshot
from .runtime.ahead import SavedKernel, save_request, warm_request
from .runtime.launch import forget_workspaces
from .runtime.prepared_call import PreparedCall
from .runtime.request import Request, read_request
from .runtime.run import run_request

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from .report.explanation import Explanation


def flex_decode(
    query: torch.Tensor,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    *,
    kv_lens: int | torch.Tensor | None = None,
    q_offset: int | torch.Tensor | None = None,
    scale: float | None = None,
    block_mask: BlockMask | None = None,
    page_table: torch.Tensor | None = None,
    q_lens: int | torch.Tensor | None = None,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_q_len: int | None = None,
    kv_starts: int | torch.Tensor | None = None,
    kv_offset: int | torch.Tensor | None = None,
    cache: KVCache | PagedKVCache | CacheLayer | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    options: DecodeOptions | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attends the newest query tokens to a KV cache, with attention written as two Python functions.

        >>> def alibi(score, b, h, q_idx, kv_idx):
        ...     return score - slopes[h] * (q_idx - kv_idx)
        >>> out = flex_decode(query, key, value, score_mod=alibi)

    Args:
        query: `[B, Hq, Q, D]`, float16, bfloat16 or float32, any strides; D from 1 to 1024. On the torch backend also
            float64: then all arithmetic is in float64, also that of the mods, but not the log-sum-exp.
            Packed, with `cu_seqlens_q`: `[T, Hq, D]`.
        key: `[B, Hkv, N, D]`; `Hq` is a multiple of `Hkv`. The batch may be 1 to serve every sequence. In a dtype that
            a query may have, or quantised: float8_e4m3fn, float8_e5m2 or int8. If it is not the query's, products are
            in the promoted dtype (`torch.promote_types`). A quantised key is multiplied in the dtype of the query.
        value: `[B, Hkv, N, Dv]`, Dv from 1 to 1024, in a dtype as for `key`. Where it is a view of the first columns of
            `key` (MLA), memory is read once.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx) -> score`. `score` is the scaled logit in natural-log units,
            `h` the query head; positions are absolute token positions in the sequence.
        mask_mod: `mask_mod(b, h, q_idx, kv_idx) -> bool`, true where the query attends to the key.
        kv_lens: live keys of each sequence, int32 or int64 `[B]`, or one number for all (an integer or a 0-d tensor);
            by default N.
        q_offset: position of the first query token, int32 or int64 `[B]`, or one number for all; by default
            `kv_offset[b] + kv_lens[b] - Q`, because the queries are the newest tokens.
        scale: factor of the dot product; by default `1 / sqrt(D)`.
        block_mask: PyTorch's BlockMask, for masks that only lists of blocks describe; holds beside `mask_mod`. Its
            rows are query positions as everywhere here: one for training fits as it is, one that was made for the
            newest tokens needs `q_offset=0`. Positions outside its rows attend to nothing, and are refused where the
            host knows them.
        page_table: pages of each sequence, int32 or int64 `[B, max_pages]`. Then `key` is
            `[num_pages, Hkv, page_size, D]` and `value` `[num_pages, Hkv, page_size, Dv]`, `kv_lens` is required, and
            N is `max_pages * page_size`. Mods see positions in the sequence, never pages. Entries past the last page
            of a sequence are not read.
        q_lens: query tokens of each sequence, int32 or int64 `[B]`, or one number for all; by default Q. What lies
            past them gives 0 with a log-sum-exp of -inf. The newest token is then token `q_lens[b] - 1`.
        k_scale: what a stored key is multiplied by: a number or a 0-d tensor, or a tensor per head `[Hkv]`, per
            sequence and head `[B, Hkv]`, or per token `[B, Hkv, N]` (paged: `[num_pages, Hkv, page_size]`). For
            quantised keys only. Without it, float8 keys are multiplied by 1; int8 keys need it.
        v_scale: the same for values.
        sinks: a logit for each query head, floating `[Hq]`, in natural-log units, that joins the softmax without a
            value.
        cu_seqlens_q: where the tokens of each sequence begin in a packed query, int32 `[B + 1]`, on the device of the
            query: sequence b has rows `cu_seqlens_q[b]` to `cu_seqlens_q[b + 1] - 1`, and its `q_len` is their number,
            which may be 0. Rows of no sequence give 0 with a log-sum-exp of -inf. Everything else is as with a padded
            query; `kv_lens`, `q_offset` and the caches have B entries. It takes the place of `q_lens`.
        cu_seqlens_k: the same for packed keys, which need no cache (cross attention, encoders). Then `key` is
            `[Tk, Hkv, D]` and `value` `[Tk, Hkv, Dv]`, and the keys of each sequence count from position 0. It needs
            `cu_seqlens_q`, and takes the place of `kv_lens`, `kv_starts`, `page_table` and `cache`. Scales are a number
            or `[Hkv]`.
        max_q_len: a hint for packed queries: no sequence has more tokens. It may make a call faster; the result never
            depends on it.
        kv_starts: first live row of the cache of each sequence, int32 or int64 `[B]`, or one number for all; by default
            0. Rows before it are padding on the left: they may hold anything, and are not read. It moves no position.
            A sequence whose `kv_starts` reaches its `kv_lens` is empty.
        kv_offset: position of row 0 of the cache of each sequence, int32 or int64 `[B]`, or one number for all, within
            +-2**30; by default 0. It is for caches whose first rows were dropped. `kv_offset=-kv_starts` counts
            positions from the first live row. `kv_lens` and `kv_starts` count rows, whatever the positions are.
        cache: a KVCache, a PagedKVCache or a layer of one, in place of key, value, kv_lens, page_table, k_scale and
            v_scale.
        return_lse: also return the natural log of the sum of exponentials, float32 `[B, Hq, Q]`, packed `[T, Hq]`.
        out: tensor `[B, Hq, Q, Dv]`, packed `[T, Hq, Dv]`, to write to, any strides; it shares no memory with an input.
        options: how to execute the call.

    Returns:
        `[B, Hq, Q, Dv]`, packed `[T, Hq, Dv]`, in the dtype of `query`, and the log-sum-exp if asked for. A row
        without a live key is 0 with a log-sum-exp of -inf, or of its sink.

    Raises:
        TypeError, ValueError: the arguments do not fit together.
        TraceError: a mod cannot be traced; the message has its line and the remedy.
        UnsupportedOpError: a mod calls an operation that flexdecode does not have.
    """
    _check_return_lse(return_lse)
    given: Any = (
        query, key, value, kv_lens, q_lens, q_offset, page_table, k_scale, v_scale, sinks, cu_seqlens_q, cu_seqlens_k,
        kv_starts, kv_offset, max_q_len, scale, out,
    )  # fmt: skip
    if torch.compiler.is_compiling() or query.__class__ is FakeTensor:
        from .integrations.region import decode_in_region

        return decode_in_region(given, score_mod, mask_mod, block_mask, cache, return_lse, options)
    counters.calls += 1
    request = read_request(tuple.__new__(Inputs, given), score_mod, mask_mod, block_mask, cache, options)
    out, lse, _ = run_request(request, ONLY_LSE if return_lse else NO_AUX, options)
    return out if lse is None else (out, lse)


def prepare(*arguments: Any, **keywords: Any) -> PreparedCall:
    """Checks a call of `flex_decode` once, so that it can be repeated with little work of the host.

        >>> step = prepare(query, key, value, score_mod=alibi, kv_lens=kv_lens)
        >>> for query in queries:
        ...     out = step(query)

    `step(query)` gives what `flex_decode` gives with the same arguments. It reads them again each time: lengths,
    caches, pages and scales in the tensors that were given here, and what the mods capture, also if it was bound anew.
    With `cache=`, sequences may grow between the steps. A step refuses another layout of the query or of a given
    tensor: another shape, dtype or device, or other strides. Strides of dimensions of size 1 do not matter. Nothing is
    computed here, but kernels may be compiled, and with `options.autotune` schedules may be measured.

    torch.compile does not trace a prepared call. A region ends before the call, and another one begins after it; with
    `fullgraph=True`, that is an error of torch.compile. torch.export cannot export it. `flex_decode` can be traced.

    A prepared call cannot be pickled or copied. Another process prepares its own.

    Args:
        arguments: those of `flex_decode`, by place. Of `query` only the layout matters; its memory is not kept.
        keywords: those of `flex_decode` but `out`, by name. An `out` is given to each step. Numbers are fixed here. A
            0-d tensor on the CPU is read at each step; a step then takes as long as a call of `flex_decode`, as it does
            with a `block_mask` or `options.debug`.

    Returns:
        The prepared call, `step(query, out=None)`.

    Raises:
        TypeError, ValueError, TraceError, UnsupportedOpError, CompileError: as `flex_decode`.
        TypeError: `out` was given.
        CompilationForbiddenError: a kernel would have to be compiled after `forbid_compilation()`.
        RuntimeError: it is called in a region that torch.export traces.
    """
    if torch.compiler.is_dynamo_compiling():
        from .runtime.outside import outside

        return outside(prepare, *arguments, **keywords)
    asked = _bind("prepare", arguments, keywords)
    if asked["out"] is not None:
        raise TypeError("prepare() takes no `out`: each step may have one of its own, `step(query, out=...)`")
    if asked["query"].__class__ is FakeTensor:
        raise RuntimeError(IN_REGION)
    inputs, cache = _inputs_of(asked), asked["cache"]
    if cache is not None:
        inputs = read_cache(cache, inputs)
    aux = ONLY_LSE if asked["return_lse"] else NO_AUX
    return PreparedCall(inputs, asked["score_mod"], asked["mask_mod"], asked["block_mask"], aux, asked["options"])


def explain(*arguments: Any, device: str | DeviceFacts | None = None, **keywords: Any) -> Explanation:
    """Says what `flex_decode` does with the same arguments; nothing is compiled or launched.

        >>> print(explain(query, key, value, mask_mod=mods.sliding_window(1024), device="H200"))

    Query, key and value may be on the meta device (`torch.empty(..., device="meta")`): only their shapes matter, and
    lengths and captured tensors may then be anywhere. These are read, so on a GPU the call waits for it.

    Args:
        arguments: those of `flex_decode`, by place.
        device: the GPU to explain for, where it is not that of the tensors: `"H200"`, or facts of your own, a
            `flexdecode.call.device.DeviceFacts`.
        keywords: those of `flex_decode`, by name. Which blocks a `block_mask` lists is not reported, and the contents
            of a `page_table` do not matter, like `return_lse`.

    Returns:
        The parts of the report as fields; its text by `str`, a picture by `save_picture`.

    Raises:
        TypeError, ValueError, TraceError, UnsupportedOpError: as `flex_decode`; also if the device is not known.
    """
    from .report.explanation import explain_request  # few programs need it

    request, _, options = _read("explain", arguments, keywords)
    return explain_request(request, options, device)


def save_kernels(
    folder: str | PathLike[str], *arguments: Any, device: str | DeviceFacts | None = None, **keywords: Any
) -> list[SavedKernel]:
    """Compiles what a call of `flex_decode` needs, and writes it into a folder for `load`. No GPU is needed.

        >>> save_kernels("kernels", query, key, value, score_mod=alibi, kv_lens=kv_lens, device="H100")

    The folder keeps what it has, so several calls can be written into it. It serves one architecture, one version of
    flexdecode and one of Triton. Writing it needs a C compiler and Python's headers. Loading it does not.

    Query, key and value may be on the meta device (`torch.empty(..., device="meta")`): only their shapes, strides and
    dtypes matter, and lengths and captured tensors may then be anywhere. Tensors on the meta device count as aligned to
    16 bytes. Number and length of the sequences decide which tiles a call uses, so write a call for each that matters.

    Args:
        folder: where to write; it is made if it does not exist.
        arguments: those of `flex_decode`, by place.
        device: the GPU to compile for, where it is not that of the tensors: `"H100"`, or the facts of another one.
        keywords: those of `flex_decode`, by name.

    Returns:
        A record of each kernel that the call needs, also of those that the folder had.

    Raises:
        TypeError, ValueError, TraceError, UnsupportedOpError: as `flex_decode`; also if the device is not known.
        CompileError: a kernel or the C helper did not compile.
        CompilationForbiddenError: something would have to be compiled after `forbid_compilation()`.
        KernelFolderError: the folder is damaged, or was written for something else.
        PermissionError: everybody can write into the folder.
    """
    return save_request(folder, *_read("save_kernels", arguments, keywords), device)


def warmup(*arguments: Any, **keywords: Any) -> None:
    """Prepares a call of `flex_decode` on the present device, so that the next such call compiles nothing.

        >>> warmup(query, key, value, score_mod=alibi, kv_lens=kv_lens)

    Nothing is computed, but with `options.autotune` schedules may be measured. Kernels come from memory, from folders
    that `load` registered, or from the compiler. Query, key and value may be on the meta device: then the call is
    prepared for the current GPU, or for the CPU if there is none, and nothing is measured.
    The number and the length of the sequences decide which tiles a call uses, so warm up each that matters.

    Args:
        arguments: those of `flex_decode`, by place.
        keywords: those of `flex_decode`, by name.

    Raises:
        TypeError, ValueError, TraceError, UnsupportedOpError, CompileError: as `flex_decode`.
        CompilationForbiddenError: a kernel would have to be compiled after `forbid_compilation()`.
    """
    warm_request(*_read("warmup", arguments, keywords))


def _read(name: str, arguments: tuple, keywords: dict[str, Any]) -> tuple[Request, Aux, DecodeOptions | None]:
    """Reads the arguments of `flex_decode` that the function `name` was given.

    Returns:
        The request, the numbers of rows that it asks for, and the options.
    """
    asked = _bind(name, arguments, keywords)
    others = (asked[name] for name in ("score_mod", "mask_mod", "block_mask", "cache", "options"))
    return read_request(_inputs_of(asked), *others), ONLY_LSE if asked["return_lse"] else NO_AUX, asked["options"]


def _bind(name: str, arguments: tuple, keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `flex_decode` by name, with defaults, that the function `name` was given.

    Raises:
        TypeError: they are not those of `flex_decode`, or `return_lse` is no bool.
    """
    try:
        given = inspect.signature(flex_decode).bind(*arguments, **keywords)
    except TypeError as error:
        raise TypeError(f"{name}() {error}") from None
    given.apply_defaults()
    _check_return_lse(given.arguments["return_lse"])
    return given.arguments


def _check_return_lse(return_lse: object) -> None:
    if return_lse is not True and return_lse is not False:
        raise TypeError(f"`return_lse` must be a bool, got {type(return_lse).__name__}")


def _inputs_of(asked: dict[str, Any]) -> Inputs:
    return Inputs(**{name: asked[name] for name in Inputs._fields})


# What `help` and notebooks show; the types of functions do not know the attribute.
_GIVEN = [*inspect.signature(flex_decode).parameters.values()]
_DEVICE = inspect.signature(explain).parameters["device"]
_FOLDER = inspect.signature(save_kernels).parameters["folder"]
explain.__signature__ = inspect.Signature([*_GIVEN, _DEVICE])  # type: ignore[attr-defined]
save_kernels.__signature__ = inspect.Signature([_FOLDER, *_GIVEN, _DEVICE])  # type: ignore[attr-defined]
prepare.__signature__ = inspect.Signature([x for x in _GIVEN if x.name != "out"])  # type: ignore[attr-defined]
warmup.__signature__ = inspect.Signature(_GIVEN)  # type: ignore[attr-defined]


def cache_info() -> CacheInfo:
    """Counts of what was traced, generated, compiled and found since the start or the last `clear_cache()`."""
    return snapshot()


def clear_cache() -> None:
    """Forgets every plan, graph and kernel in memory and resets the counters; the disk cache and loaded folders stay.

    From Triton 3.8 on this unloads the kernels that Triton launches from the GPU, such as those of `append`. A CUDA
    graph that holds one must not be replayed after it.
    """
    with lock:
        forget_memos()
        forget_kernels()
        forget_workspaces()
        reset()
