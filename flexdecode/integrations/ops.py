"""The custom ops of PyTorch that stand for calls in compiled and exported graphs.

A mod is an argument of type `str`: the canonical text of its graph, which is parsed and never executed. What it
captures follows as lists. `region` makes these arguments while a region is compiled.
"""

from __future__ import annotations

import functools
import json
from dataclasses import fields
from typing import Any

import torch

from ..call.block_mask import BlockMaskOfOp, ListsOfOp
from ..call.inputs import DecodeOptions, Inputs, contiguous_strides, strides_in_order
from ..call.signature import NO_AUX, ONLY_LSE, Aux
from ..errors import FlexDecodeError
from ..frontend.parse import CanonicalMod
from ..kv.cache import append_in_region
from ..kv.layers import write_step_in_region
from ..kv.merge import merge_attention
from ..kv.slots import check_slots, write_kv
from ..kv.writing import Reserved, Stored, check_new
from ..runtime.plan import Results
from ..runtime.request import Request, read_request
from ..runtime.run import run_request

LIBRARY = torch.library.Library("flexdecode", "DEF")
_MOD = "str {0}_mod, SymInt[] {0}_ints, Tensor[] {0}_floats, Tensor[] {0}_tensors"
_CALL = (
    f"Tensor query, Tensor key, Tensor value, {_MOD.format('score')}, {_MOD.format('mask')}, str names,"
    " Tensor[] tensors, SymInt[] ints, Tensor[] block_lists, SymInt[] block_sizes, float? scale, str options"
)
_ABSENT = (None,) * (len(Inputs._fields) - 5)  # what a call may lack, without the scale and `out`
LIBRARY.define(f"decode({_CALL}) -> Tensor")
LIBRARY.define(f"decode_with_lse({_CALL}) -> (Tensor, Tensor)")
LIBRARY.define(f"flex_attention({_CALL}, bool lse, bool max_scores) -> (Tensor, Tensor, Tensor)")
_INTO = "Tensor(a!) key, Tensor(b!)? value, Tensor(c!)? k_scale, Tensor(d!)? v_scale"  # values may be columns of keys
LIBRARY.define(
    f"append(Tensor k, Tensor? v, {_INTO}, Tensor(e!)? page_table, Tensor(f!) kv_lens, Tensor(g!) limits,"
    " Tensor(h!) arrivals, Tensor number, SymInt[]? num_tokens, SymInt? sequence) -> ()"
)
LIBRARY.define(
    f"write_reserved(Tensor k, Tensor? v, {_INTO}, Tensor page_table, Tensor starts, Tensor ends, Tensor cu_seqlens,"
    " Tensor number, SymInt? sequence) -> ()"
)
LIBRARY.define(
    f"write_kv(Tensor k, Tensor? v, {_INTO}, Tensor slot_mapping, float? k_number=None, float? v_number=None) -> ()"
)
LIBRARY.define("merge_attention(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)")


@functools.lru_cache(maxsize=256)
def _places(names: str) -> tuple[list[int], list[int], list[int]]:
    """The places in `Inputs` of arguments that are tensors, of those that are integers, and of scales."""
    tensors, ints = ([Inputs._fields.index(name) for name in part.split()] for part in names.split("|"))
    return tensors, ints, [place for place in tensors if Inputs._fields[place] in ("k_scale", "v_scale", "scale")]


@functools.lru_cache(maxsize=64)
def _options(text: str) -> DecodeOptions | None:
    return DecodeOptions(**json.loads(text)) if text else None


OPTION_NAMES = tuple(x.name for x in fields(DecodeOptions))


def options_text(*values: Any) -> str:
    """The `options` argument of the ops, from the values of `OPTION_NAMES`."""
    return json.dumps(dict(zip(OPTION_NAMES, values, strict=True)))


def _mod(text: str, ints: list[int], floats: list[torch.Tensor], tensors: list[torch.Tensor]) -> CanonicalMod | None:
    return CanonicalMod(text, [*ints, *[x.item() for x in floats], *tensors]) if text else None


def _request(call: tuple) -> tuple[Request, DecodeOptions | None]:
    """The call that the arguments of an op describe."""
    query, key, value, s_mod, s_ints, s_floats, s_tensors, m_mod, m_ints, m_floats, m_tensors, *rest = call
    names, tensors, ints, block_lists, block_sizes, scale, options_of = rest
    given: list = [query, key, value, *_ABSENT, scale, None]
    if names != "|":
        of_tensors, of_ints, of_scales = _places(names)
        for place, x in zip(of_tensors, tensors, strict=True):
            given[place] = x
        for place, x in zip(of_ints, ints, strict=True):
            given[place] = x
        for place in of_scales:
            if not given[place].ndim and given[place].device.type == "cpu":
                given[place] = given[place].item()
    score, mask = _mod(s_mod, s_ints, s_floats, s_tensors), _mod(m_mod, m_ints, m_floats, m_tensors)
    options, block_mask = _options(options_of), None
    if block_lists:  # the mask includes that of the lists
        *sizes, place, is_alone = block_sizes
        block_mask = BlockMaskOfOp(ListsOfOp.of(block_lists, sizes), mask, len(m_ints) + len(m_floats) + place)
        mask = None if is_alone else mask
    return read_request(Inputs(*given), score, mask, block_mask, options=options), options


def run_in_order(request: Request, aux: Aux, options: DecodeOptions | None) -> Results:
    """Runs a request; the rows of its output lie in memory in the order of those of the query, as PyTorch's do."""
    inputs = request.inputs
    shape = inputs.out_shape
    strides, is_contiguous = _known_strides(shape, inputs.query.stride())
    if not is_contiguous:
        out = inputs.query.new_empty_strided(shape, strides)
        return run_request(request._replace(inputs=inputs._replace(out=out)), aux, options)
    results = run_request(request, aux, options)
    if results.out.stride() == strides:
        return results
    return results._replace(out=results.out.as_strided(shape, strides))


@functools.lru_cache(maxsize=1024)
def _known_strides(shape: tuple[int, ...], of_query: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """As `strides_in_order`, and whether a contiguous output has its elements at the same places."""
    strides = strides_in_order(shape, of_query)
    alike = zip(shape, strides, contiguous_strides(shape), strict=True)
    return strides, all(size == 1 or step == other for size, step, other in alike)


def _decode(*call: Any) -> torch.Tensor:
    request, options = _request(call)
    return run_request(request, NO_AUX, options).out


def _decode_with_lse(*call: Any) -> tuple[torch.Tensor | None, ...]:
    request, options = _request(call)
    return run_request(request, ONLY_LSE, options)[:2]


def _flex_attention(*call: Any) -> tuple[torch.Tensor, ...]:
    """What is not asked for is an empty tensor."""
    *others, lse, max_scores = call
    request, options = _request(tuple(others))
    results = run_in_order(request, Aux(lse, max_scores), options)
    return tuple(results.out.new_empty(0, dtype=torch.float32) if x is None else x for x in results)


def _check_texts(arguments: tuple) -> None:
    """Refuses a text that is not one line.

    Compilers write the arguments of an op into comments of their code, where a new line would begin a statement.
    """
    if not all(x.isprintable() for x in arguments if isinstance(x, str)):
        raise FlexDecodeError("the texts of an op are one line each: this one was not written by flexdecode")


def _fake_out(query: torch.Tensor, _: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    _check_texts(rest)
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _fake_both(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_out(query, *rest), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _fake_flex_attention(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    *others, lse, max_scores = rest
    shape = _fake_out(query, *others).shape
    numbers = [query.new_empty(shape[:3] if asked else (0,), dtype=torch.float32) for asked in (lse, max_scores)]
    return query.new_empty_strided(shape, strides_in_order(shape, query.stride())), *numbers


def _fake_merge(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _append(k: torch.Tensor, v: torch.Tensor | None, *of_cache: Any) -> None:
    *tensors, number, num_tokens, sequence = of_cache
    append_in_region(k, v, tensors, number.item(), num_tokens, sequence)


def _write_reserved(k: torch.Tensor, v: torch.Tensor | None, *of_layer: Any) -> None:
    *tensors, number, sequence = of_layer
    write_step_in_region(k, v, Stored(*tensors[:4]), Reserved(*tensors[4:]), number.item(), sequence)


def _write_kv(
    k: torch.Tensor,
    v: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    k_number: float | None = None,
    v_number: float | None = None,
) -> None:
    scales = k_number if k_scale is None else k_scale, v_number if v_scale is None else v_scale
    write_kv(k, v, key, value, slot_mapping, *scales)


def _fake_append(
    k: torch.Tensor, v: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor | None, *others: Any
) -> None:
    packed = k.dim() == 3
    check_new(k, v, key, value, None if packed else len(others[3]) if others[-1] is None else 1)
    _refuse_export()


def _fake_write_kv(
    k: torch.Tensor, v: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor | None, *others: Any
) -> None:
    check_slots(others[2], key, check_new(k, v, key, value, None))


def _refuse_export() -> None:
    if torch.compiler.is_exporting():  # not in the cache's own function, where Dynamo of torch 2.9 would say so always
        raise RuntimeError(
            "append() cannot be exported, because the cache stays in this process: export what is around it"
        )


for _name, _function, _fake in (
    ("append", _append, _fake_append),
    ("write_reserved", _write_reserved, _fake_append),
    ("write_kv", _write_kv, _fake_write_kv),
):
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"flexdecode::{_name}", _fake, lib=LIBRARY)
LIBRARY.impl("decode", _decode, "CompositeExplicitAutograd")
LIBRARY.impl("decode_with_lse", _decode_with_lse, "CompositeExplicitAutograd")
LIBRARY.impl("flex_attention", _flex_attention, "CompositeExplicitAutograd")
LIBRARY.impl("merge_attention", merge_attention, "CompositeExplicitAutograd")
torch.library.register_fake("flexdecode::merge_attention", _fake_merge, lib=LIBRARY)
torch.library.register_fake("flexdecode::decode", _fake_out, lib=LIBRARY)
torch.library.register_fake("flexdecode::decode_with_lse", _fake_both, lib=LIBRARY)
torch.library.register_fake("flexdecode::flex_attention", _fake_flex_attention, lib=LIBRARY)
