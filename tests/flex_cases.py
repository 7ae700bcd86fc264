"""Calls that PyTorch's own tests of decoding make, for `flexdecode.integrations.flex_attention`; all tiers run them.

The list is that of test/inductor/test_flex_decoding.py in PyTorch. Every result is compared with the reference: output,
log-sum-exp and largest scores.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from support import assert_close_to_reference, assert_max_scores, make_inputs
from torch.nn.attention.experimental._paged_attention import PagedAttention
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, noop_mask

from flexdecode.integrations import flex_attention

BOTH = AuxRequest(lse=True, max_scores=True)


class Sizes(NamedTuple):
    """The sizes of a call; key and value may have another batch and another width."""

    B: int
    HQ: int
    HKV: int
    Q: int
    N: int
    D: int
    DV: int | None = None
    BKV: int | None = None


# --- Mods -------------------------------------------------------------------------------------------------------------


def only_where(condition):
    """A score_mod that keeps scores where `condition(q_idx, kv_idx)` is true."""

    def keep(score, b, h, q_idx, kv_idx):
        return torch.where(condition(q_idx, kv_idx), score, -float("inf"))

    return keep


def distance(score, b, h, q_idx, kv_idx):
    return score + (q_idx - kv_idx)


def causal_distance(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx >= kv_idx, score + (q_idx - kv_idx), -float("inf"))


def alibi(score, b, h, q_idx, kv_idx):
    return score + (kv_idx - q_idx) * torch.exp2(-((h + 1) * 8.0 / 8))


causal = only_where(lambda q_idx, kv_idx: q_idx >= kv_idx)
anti_causal = only_where(lambda q_idx, kv_idx: q_idx <= kv_idx)

SCORE_MODS = {
    "identity": lambda score, b, h, q_idx, kv_idx: score,
    "doubled": lambda score, b, h, q_idx, kv_idx: score * 2,
    "squared": lambda score, b, h, q_idx, kv_idx: score * score,
    "causal": causal,
    "anti_causal": anti_causal,
    "distance": distance,
    "causal_distance": causal_distance,
    "alibi": alibi,
    "window": only_where(lambda q_idx, kv_idx: q_idx + 1000 >= kv_idx),
}


def after(offset):
    """A mask_mod of the keys that are at least `offset` after the query."""
    return lambda b, h, q_idx, kv_idx: kv_idx >= q_idx + offset


def up_to(offset):
    """A mask_mod of the keys that are at most `offset` after the query."""
    return lambda b, h, q_idx, kv_idx: q_idx + offset >= kv_idx


class Tensors:
    """Makes what mods capture."""

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(1)

    def random(self, *shape, dtype=None):
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def of(self, numbers, dtype=torch.int32):
        return torch.as_tensor(numbers, dtype=dtype, device=self.device)


# --- The mods of cases, made of sizes and `Tensors`: a score_mod and a mask_mod ---------------------------------------


def odd_keys_skipped(sizes, tensors):
    return only_where(lambda q_idx, kv_idx: kv_idx % 2 == 0), None


def composed(sizes, tensors):
    return lambda score, b, h, m, n: anti_causal(distance(score, b, h, m, n), b, h, m, n), None


def captured_head_offsets(sizes, tensors):
    offsets = tensors.random(sizes.HQ)
    return lambda score, b, h, q_idx, kv_idx: score + offsets[h], None


def captured_in_all_dimensions(sizes, tensors):
    of_b, of_h, of_q, of_kv = (tensors.random(n, dtype=torch.float32) for n in (sizes.B, sizes.HQ, sizes.Q, sizes.N))
    return lambda score, b, h, q_idx, kv_idx: score + of_kv[kv_idx] + of_q[q_idx] + of_h[h] + of_b[b], None


def two_sequences(sizes, tensors):
    second = tensors.of([i >= sizes.N // 2 for i in range(sizes.N)], torch.bool)
    return only_where(lambda q_idx, kv_idx: second[q_idx] == second[kv_idx]), None


def offset_mask(sizes, tensors):
    return None, after(tensors.of(sizes.N // 2 - 1))


def offset_mask_and_bias(sizes, tensors):
    of_q, of_kv = (tensors.random(n, dtype=torch.bfloat16) for n in (sizes.Q, sizes.N))
    mask_mod = after(tensors.of(sizes.N // 2 - 3))
    return lambda score, b, h, q_idx, kv_idx: score + of_kv[kv_idx] + of_q[q_idx], mask_mod


def bias_of_keys(sizes, tensors):
    bias = tensors.random(sizes.Q, sizes.N)
    return lambda score, b, h, q_idx, kv_idx: score + bias[q_idx, kv_idx], None


def bias_of_batches(sizes, tensors):
    bias = tensors.random(sizes.B, sizes.Q, sizes.N)
    return lambda score, b, h, q_idx, kv_idx: score + bias[b, q_idx, kv_idx], None


def bias_of_heads(sizes, tensors):
    bias = tensors.random(sizes.B, sizes.HQ, sizes.Q, sizes.N)
    return lambda score, b, h, q_idx, kv_idx: score + bias[b, h, q_idx, kv_idx], None


def mask_of_heads(sizes, tensors):
    attends = tensors.of([h > 0 for h in range(sizes.HQ)], torch.bool)
    return None, lambda b, h, q_idx, kv_idx: attends[h] & (q_idx >= kv_idx)


def divided_positions(sizes, tensors):
    return lambda score, b, h, q_idx, kv_idx: score - q_idx // (1 + kv_idx), None


def silu(sizes, tensors):
    return lambda score, b, h, q_idx, kv_idx: torch.nn.functional.silu(score), None


def limited_scores(sizes, tensors):
    limits = tensors.of(range(1, sizes.B + 1))

    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(score <= limits[b], causal(score, b, h, q_idx, kv_idx), -float("inf"))

    return score_mod, None


def captured_number(sizes, tensors):
    one = tensors.of(1)
    return lambda score, b, h, q_idx, kv_idx: score + one, None


def captured_reduction(sizes, tensors):
    table = tensors.random(sizes.B, 8, dtype=torch.float32)
    return lambda score, b, h, q_idx, kv_idx: score + table[b].sum(dim=-1), None


def packed_documents(sizes, tensors):
    starts = [0, sizes.N // 2, sizes.N // 4 * 3, sizes.N]
    offsets = tensors.of(starts)
    document = tensors.of([sum(i >= start for start in starts[1:]) for i in range(sizes.N)])

    def score_mod(score, b, h, q_idx, kv_idx):
        q_inside, kv_inside = (i - offsets[document[i]] for i in (q_idx, kv_idx))
        return causal(score, b, h, q_inside, kv_inside)

    return score_mod, None


def no_mods(sizes, tensors):
    return None, None


def rows_without_keys(sizes, tensors):
    return None, lambda b, h, q_idx, kv_idx: q_idx < sizes.Q // 2


def window_by_score(sizes, tensors):
    return only_where(lambda q_idx, kv_idx: q_idx + sizes.N // 2 >= kv_idx), None


def window_by_mask(sizes, tensors):
    return None, up_to(sizes.N // 2)


def window_by_both(sizes, tensors):
    return window_by_score(sizes, tensors)[0], up_to(sizes.N // 2)


class Case(NamedTuple):
    """The mods of a case, and the sizes that differ from those of the tier; a size below 0 is added to that one."""

    mods: Callable
    changed: Mapping = MappingProxyType({})


ODD = {"N": -3}  # fewer keys than whole blocks have
CASES = {
    case.mods.__name__ + suffix: case
    for suffix, case in (
        ("", Case(no_mods)),
        ("", Case(odd_keys_skipped)),
        ("", Case(composed)),
        ("", Case(captured_head_offsets)),
        ("", Case(captured_in_all_dimensions)),
        ("", Case(two_sequences)),
        ("", Case(offset_mask, ODD)),
        ("", Case(offset_mask_and_bias, ODD)),
        (" of 3 tokens", Case(offset_mask, ODD | {"Q": 3})),
        (" of 3 tokens", Case(offset_mask_and_bias, ODD | {"Q": 3})),
        ("", Case(bias_of_keys)),
        ("", Case(bias_of_batches)),
        ("", Case(bias_of_heads)),
        ("", Case(mask_of_heads)),
        ("", Case(divided_positions, {"B": 2, "Q": 8})),
        ("", Case(silu)),
        ("", Case(limited_scores)),
        ("", Case(captured_number)),
        ("", Case(captured_reduction)),
        ("", Case(packed_documents)),
        ("", Case(rows_without_keys, {"Q": 6})),
        ("", Case(window_by_score, {"Q": 8})),
        ("", Case(window_by_mask, {"Q": 8})),
        ("", Case(window_by_both, {"Q": 8})),
    )
}


# --- Running a case ---------------------------------------------------------------------------------------------------


def run_case(name, sizes, dtype, device="cpu", page_size=None, **arguments):
    """Runs a case of `CASES`; `arguments` are those of `check`."""
    case = CASES[name]
    changed = {key: n + getattr(sizes, key) if n < 0 else n for key, n in case.changed.items()}
    sizes = sizes._replace(**changed)
    score_mod, mask_mod = case.mods(sizes, Tensors(device, dtype))
    if page_size is not None:
        check_paged(sizes, dtype, score_mod, mask_mod, device=device, page_size=page_size, **arguments)
    else:
        check(inputs_of(sizes, dtype, device), score_mod, mask_mod, **arguments)


def inputs_of(sizes, dtype, device="cpu", seed=0):
    """Query, key and value."""
    B, HQ, HKV, Q, N, D, DV, BKV = sizes
    query, key, value = make_inputs(B, HQ, HKV, Q, N, D, DV, dtype=dtype, device=device, seed=seed)
    return query, key[:BKV], value[:BKV]


def block_mask_of(mask_mod, query, num_keys, block_size=128):
    """The BlockMask of a mask_mod, with a row for each sequence and each head."""
    return create_block_mask(mask_mod, *query.shape[:3], num_keys, device=query.device, BLOCK_SIZE=block_size)


def check(inputs, score_mod=None, mask_mod=None, *, block_size=None, attention=flex_attention, **arguments):
    """Calls `attention` and compares all that it returns with the reference.

    Args:
        inputs: query, key and value.
        score_mod: of the call.
        mask_mod: the call gets its BlockMask.
        block_size: of the BlockMask. If it is given, there is one without a mask_mod, too.
        attention: the function to call.
        arguments: further arguments of the call.
    """
    query, key, _ = inputs
    block_mask = None
    if mask_mod is not None or block_size is not None:
        block_mask = block_mask_of(mask_mod or noop_mask, query, key.shape[2], block_size or 128)
    gqa = query.shape[1] != key.shape[1]
    out, aux = attention(*inputs, score_mod, block_mask, enable_gqa=gqa, return_aux=BOTH, **arguments)
    assert_right(out, aux, inputs, score_mod, mask_mod)
    return out


def assert_right(out, aux, inputs, score_mod, mask_mod):
    """Compares what a call returns with the reference."""
    assert out.dtype == inputs[0].dtype
    assert_close_to_reference(out, aux.lse, *inputs, score_mod, mask_mod, q_offset=0)
    assert_max_scores(aux.max_scores, *inputs[:2], score_mod, mask_mod)


def check_paged(sizes, dtype, score_mod, mask_mod, *, page_size, device="cpu", attention=flex_attention, **arguments):
    """As `check`, with keys and values in pages."""
    query, key, value = inputs = inputs_of(sizes, dtype, device)
    call = query, *paged(query, key, value, score_mod, mask_mod, page_size)
    gqa = query.shape[1] != key.shape[1]
    out, aux = attention(*call, enable_gqa=gqa, return_aux=BOTH, **arguments)
    assert_right(out, aux, inputs, score_mod, mask_mod)


def paged(query, key, value, score_mod, mask_mod, page_size):
    """Key, value, score_mod and BlockMask of a call whose cache is cut into pages by PyTorch's PagedAttention.

    The pages of all sequences are one cache of batch 1, and the mods know which keys are whose.
    """
    batch, device, num_keys = len(query), query.device, key.shape[2]
    pages = PagedAttention(batch * -(-num_keys // page_size), page_size, batch, device=device)
    for share in (4, 2, 1):  # the sequences grow by turns, so that their pages mix
        for b in range(batch):
            pages.reserve(torch.tensor(b, device=device), torch.tensor(num_keys // share, device=device))
    caches = [x.new_zeros(1, x.shape[1], pages.n_pages * page_size, x.shape[3]) for x in (key, value)]
    places = torch.arange(num_keys, device=device).expand(batch, -1)
    pages.assign(torch.arange(batch, device=device), places, key, value, *caches)
    lens = torch.full((batch,), num_keys, device=device)
    logical = block_mask_of(mask_mod or noop_mask, query, num_keys, (128, page_size))
    return *caches, pages.get_score_mod(score_mod, lens), pages.convert_logical_block_mask(logical, kv_len=lens)
