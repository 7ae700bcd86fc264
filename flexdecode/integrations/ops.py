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
from ..call.inputs import DecodeOptions, Inputs
from ..errors import FlexDecodeError
from ..frontend.parse import CanonicalMod
from ..kv.kv_cache import CacheTensors
from ..kv.merge import merge_attention
from ..runtime.request import read_request
from ..runtime.run import run_request

LIBRARY = torch.library.Library("flexdecode", "DEF")
_MOD = "str {0}_mod, SymInt[] {0}_ints, Tensor[] {0}_floats, Tensor[] {0}_tensors"
_CALL = (
    f"(Tensor query, Tensor key, Tensor value, {_MOD.format('score')}, {_MOD.format('mask')}, str names,"
    " Tensor[] tensors, SymInt[] ints, Tensor[] block_lists, SymInt[] block_sizes, float? scale, str options)"
)
LIBRARY.define(f"decode{_CALL} -> Tensor")
LIBRARY.define(f"decode_with_lse{_CALL} -> (Tensor, Tensor)")
LIBRARY.define(
    "append(Tensor k, Tensor v, Tensor(a!) key, Tensor(b!) value, Tensor(c!)? k_scale, Tensor(d!)? v_scale,"
    " Tensor? page_table, Tensor(e!) kv_lens, Tensor limits, Tensor(f!) arrivals) -> ()"
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


def _run(call: tuple, return_lse: bool) -> Any:
    """Runs a call that is given by the arguments of an op."""
    query, key, value, s_mod, s_ints, s_floats, s_tensors, m_mod, m_ints, m_floats, m_tensors, *rest = call
    names, tensors, ints, block_lists, block_sizes, scale, options_of = rest
    given: list = [query, key, value, *[None] * 12, scale, None]
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
    request = read_request(Inputs(*given), score, mask, block_mask, options=options)
    return run_request(request, return_lse, options)


def _fake_out(query: torch.Tensor, _: torch.Tensor, value: torch.Tensor, *rest: Any) -> torch.Tensor:
    # Compilers write the arguments of an op into comments of their code, where a new line would begin a statement.
    if not all(x.isprintable() for x in rest if isinstance(x, str)):
        raise FlexDecodeError("the texts of an op are one line each: this one was not written by flexdecode")
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _fake_both(query: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _fake_out(query, *rest), query.new_empty(query.shape[:-1], dtype=torch.float32)


def _fake_merge(outs: list[torch.Tensor], lses: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _append(k: torch.Tensor, v: torch.Tensor, *cache: torch.Tensor) -> None:
    tensors = CacheTensors(*cache)
    tensors.check_new(k, v)
    tensors.append_reserved(k, v)


def _fake_append(k: torch.Tensor, v: torch.Tensor, *cache: torch.Tensor) -> None:
    CacheTensors(*cache).check_new(k, v)


LIBRARY.impl("append", _append, "CompositeExplicitAutograd")
torch.library.register_fake("flexdecode::append", _fake_append, lib=LIBRARY)
LIBRARY.impl("decode", lambda *call: _run(call, False), "CompositeExplicitAutograd")
LIBRARY.impl("decode_with_lse", lambda *call: _run(call, True), "CompositeExplicitAutograd")
LIBRARY.impl("merge_attention", merge_attention, "CompositeExplicitAutograd")
torch.library.register_fake("flexdecode::merge_attention", _fake_merge, lib=LIBRARY)
torch.library.register_fake("flexdecode::decode", _fake_out, lib=LIBRARY)
torch.library.register_fake("flexdecode::decode_with_lse", _fake_both, lib=LIBRARY)
