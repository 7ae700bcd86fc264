"""Caches that grow: a length that was not seen before costs no tracing, no solving, no generation and no kernel."""

import os
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MODS, assert_close_to_reference, make_inputs

from flexdecode import DecodeOptions, cache_info, clear_cache, flex_decode, memos, mods
from flexdecode.analysis import bounds, proofs
from flexdecode.call import splits
from flexdecode.call.device import KNOWN_DEVICES, DeviceFacts
from flexdecode.codegen.arguments import ARGUMENTS
from flexdecode.runtime import launch, prepare, run
from flexdecode.runtime.identity import identify

TRITON = DecodeOptions(backend="triton")
H200, _ = KNOWN_DEVICES["H200"]
LENGTHS = max(1500, int(os.environ.get("FLEXDECODE_EXAMPLES", "0")))


class Kernel:
    """Stands for a compiled kernel; remembers what it was compiled from."""

    block_dv, of_small, pick = 64, False, None

    def __init__(self, *built_from):
        self.built_from = built_from


class Host:
    """Calls go the way of a GPU up to the launch, and are counted.

    Attributes:
        kernels: what kernels were asked for.
        launched: the launchers of all calls.
        solved, proven: how often bounds were solved, and proofs by a mask tried.
    """

    def __init__(self, monkeypatch, facts=H200):
        self.kernels, self.launched, self.solved, self.proven = [], [], 0, 0
        monkeypatch.setattr(prepare, "device_facts", lambda _: facts)
        monkeypatch.setattr(prepare, "find_kernel", self.find_kernel)
        monkeypatch.setattr(prepare, "find_combine", Kernel)
        monkeypatch.setattr(launch.TritonLauncher, "__call__", lambda launcher, *_: self.launched.append(launcher))
        monkeypatch.setattr(bounds, "_solve", self.counted(bounds._solve, "solved"))
        monkeypatch.setattr(proofs, "_is_never", self.counted(proofs._is_never, "proven"))
        clear_cache()

    def find_kernel(self, spec, facts, proven):
        self.kernels.append((spec, facts, proven.text))
        return Kernel(spec, facts, proven.text)

    def counted(self, function, name):
        def run(*arguments):
            setattr(self, name, getattr(self, name) + 1)
            return function(*arguments)

        return run


@pytest.fixture
def host(monkeypatch):
    yield Host(monkeypatch)
    clear_cache()


def grown(length, batch=2, heads=2, dim=64, dtype=torch.bfloat16):
    """What `torch.cat` gives for a token more."""
    return torch.empty(batch, heads, length, dim, dtype=dtype)


def query(heads=4, tokens=1, batch=2, dim=64, dtype=torch.bfloat16):
    return torch.empty(batch, heads, tokens, dim, dtype=dtype)


MAX_KV_LEN = [row.name for row in ARGUMENTS].index("max_kv_len")


def numbers(launcher):
    """All that a launch depends on but addresses and captured values."""
    state = dict(vars(launcher))
    state["combine"] = state["combine"] and state["combine"].built_from
    state["passes"] = [dict(vars(one)) for one in (state.pop("first"), *state.pop("large"))]
    for one in state["passes"]:
        form = one.pop("form")
        readers = (form.read_score, form.read_mask)
        one["form"] = form.kernel.built_from, [(r.numbers, r.tensors, r.types) for r in readers]
    return state


def prepared():
    """How many calls were prepared from nothing."""
    return sum(len(known.prepared) for known in run._calls.values())


table = torch.zeros(4, 3000)


def bias_of_the_table(score, b, h, q_idx, kv_idx):
    return score + table[h, kv_idx]


def distance(score, b, h, q_idx, kv_idx):
    return score + table[h, q_idx - kv_idx]


CASES = {
    "plain": (None, None),
    "alibi + window": (mods.alibi(4), mods.sliding_window(100)),
    "softcap + chunked": (mods.softcap(20.0), mods.chunked(64)),
    "bias": (bias_of_the_table, mods.causal()),
    "distance": (distance, mods.sliding_window(500)),
    "document": (None, mods.document(torch.zeros(2, 5000, dtype=torch.int32))),
}


# --- What a new length costs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_new_length_solves_and_builds_nothing(host, case):
    score_mod, mask_mod = CASES[case]
    q = query()
    for length in range(1, 600):
        flex_decode(q, grown(length), grown(length), score_mod, mask_mod, options=TRITON)
    assert len(host.launched) == 599
    info = cache_info()
    assert (info.generations, info.compilations, info.hits) == (0, 0, 0)
    assert info.traces == (score_mod is not None) + (mask_mod is not None)
    assert host.solved <= 1 and host.proven <= 4
    assert len(host.kernels) == len({(spec, text) for spec, _, text in host.kernels}) <= 12
    assert prepared() <= 3


@pytest.mark.parametrize("case", CASES)
def test_a_new_number_of_query_tokens_solves_and_builds_nothing(host, case):
    score_mod, mask_mod = CASES[case]
    kv = grown(2000)
    lens = torch.tensor([2000, 700])
    for tokens in range(2, 400):
        packed = torch.zeros(tokens, 4, 64, dtype=torch.bfloat16)
        starts = torch.tensor([0, tokens // 3, tokens], dtype=torch.int32)
        for hint in (None, 1):
            flex_decode(
                packed, kv, kv, score_mod, mask_mod, kv_lens=lens, cu_seqlens_q=starts, max_q_len=hint, options=TRITON
            )
        padded = torch.zeros(2, 4, tokens, 64, dtype=torch.bfloat16)
        flex_decode(padded, kv, kv, score_mod, mask_mod, options=TRITON)
    info = cache_info()
    assert info.traces == (score_mod is not None) + (mask_mod is not None) and host.solved <= 1
    # By rows of a tile, descriptors or pointers, splits, and the balanced schedule.
    assert len(host.kernels) == len({(spec, text) for spec, _, text in host.kernels}) <= 12
    assert prepared() == 2


def packed_call(counts, tokens=None, pages=24, width=8):
    """A step of a server: packed queries over a cache in pages."""
    total = sum(counts) if tokens is None else tokens
    kv = grown(16, batch=pages)
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    lens = torch.full((len(counts),), 40, dtype=torch.int32)
    tables = torch.zeros(len(counts), width, dtype=torch.int32)
    hint = 1 if max(counts) == 1 else None
    return torch.zeros(total, 4, 64, dtype=torch.bfloat16), kv, {
        "kv_lens": lens, "page_table": tables, "cu_seqlens_q": starts, "max_q_len": hint,
    }  # fmt: skip


def run_packed(case, counts, **more):
    q, kv, arguments = packed_call(counts)
    flex_decode(q, kv, kv, *CASES[case], options=TRITON, **arguments, **more)


@pytest.mark.parametrize("extra", [(), ("q_offset",), ("kv_starts", "kv_offset")], ids=str)
@pytest.mark.parametrize("case", ["plain", "alibi + window", "softcap + chunked", "bias"])
def test_a_new_number_of_packed_sequences_prepares_nothing(host, case, extra):
    for size in range(1, 130):
        counts = [1] * size if size % 2 else [1 + i % 3 for i in range(size)]
        run_packed(case, counts, **{name: torch.zeros(size, dtype=torch.int64) for name in extra})
    info = cache_info()
    score_mod, mask_mod = CASES[case]
    assert info.traces == (score_mod is not None) + (mask_mod is not None) and host.solved <= 1
    assert prepared() == 1 and len(host.kernels) <= 12


def test_a_new_number_of_sequences_launches_as_in_a_new_process(host):
    for case in ("alibi + window", "bias"):
        for size in (3, 70, 1, 8, 256):
            run_packed(case, [1] * size)
        warm = host.launched[-5:]
        for size, launcher in zip((3, 70, 1, 8, 256), warm, strict=True):
            clear_cache()
            run_packed(case, [1] * size)
            assert numbers(host.launched[-1]) == numbers(launcher)


def test_a_table_that_is_too_short_for_more_sequences_is_checked(host):
    """A proof for few sequences is not one for many."""
    by_sequence = torch.zeros(5)
    for size in (2, 5, 6, 3):
        q, kv, arguments = packed_call([1] * size)
        flex_decode(q, kv, kv, lambda s, b, h, q_idx, kv_idx: s + by_sequence[b], options=TRITON, **arguments)
    checks = ["outside=True" in launcher.first.form.kernel.built_from[2] for launcher in host.launched]
    assert checks == [False, False, True, False]
    assert prepared() == 1


@pytest.mark.parametrize("wrong", ["kv_lens", "page_table", "q_offset", "kv_starts", "kv_offset"])
def test_packed_sequences_of_wrong_numbers_are_refused(host, wrong):
    """Also after right calls of the same number of sequences, and of the wrong one."""
    for size in (4, 5):
        extra = {} if wrong in ("kv_lens", "page_table") else {wrong: torch.zeros(size, dtype=torch.int64)}
        run_packed("alibi + window", [1] * size, **extra)
    q, kv, arguments = packed_call([1] * 4)
    _, _, others = packed_call([1] * 5)
    value = others[wrong] if wrong in others else torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"`{wrong}` must have shape"):
        flex_decode(q, kv, kv, *CASES["alibi + window"], options=TRITON, **arguments | {wrong: value})


def test_another_out_is_checked(host):
    """What is prepared for any number of tokens says nothing of an `out` of another shape."""
    kv, starts = grown(300), torch.tensor([0, 3, 5], dtype=torch.int32)
    for tokens in (5, 6, 7):
        q, out = torch.zeros(tokens, 4, 64, dtype=torch.bfloat16), torch.zeros(tokens, 4, 64, dtype=torch.bfloat16)
        assert flex_decode(q, kv, kv, cu_seqlens_q=starts, out=out, options=TRITON) is out
    assert prepared() == 1
    with pytest.raises(ValueError, match="`out` must have shape"):
        flex_decode(q, kv, kv, cu_seqlens_q=starts, out=out[:4], options=TRITON)
    with pytest.raises(ValueError, match="`out` must have a place of its own"):
        flex_decode(q, kv, kv, cu_seqlens_q=starts, out=out[:1].expand(7, -1, -1), options=TRITON)


def test_an_out_with_tokens_before_heads(host):
    q, out = query(), torch.zeros(2, 1, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
    for length in range(1, 200):
        flex_decode(q, grown(length), grown(length), out=out, options=TRITON)
    assert prepared() <= 3
    apart = torch.zeros(2, 4, 1, 128, dtype=torch.bfloat16)[..., ::2]
    for length in range(1, 5):
        flex_decode(q, grown(length), grown(length), out=apart, options=TRITON)
    with pytest.raises(ValueError, match="`out` must have a place of its own"):
        flex_decode(q, grown(5), grown(5), out=out[:1].expand(2, -1, -1, -1), options=TRITON)


def test_a_growing_page_table(host):
    pages, lens = grown(16, batch=8), torch.tensor([5, 7])
    for width in range(1, 200):
        tables = torch.zeros(2, width, dtype=torch.int32)
        flex_decode(query(), pages, pages, kv_lens=lens, page_table=tables, options=TRITON)
    assert prepared() == 1 and len(host.kernels) <= 8
    lengths = {launcher.first.arguments[MAX_KV_LEN] for launcher in host.launched}
    assert lengths == {16 * width for width in range(1, 200)}


def test_a_capture_that_grows(host):
    """The mod is a new lambda, over a new tensor, for every token."""
    for length in range(1, 200):
        bias = torch.zeros(4, length)
        kv = grown(length)
        flex_decode(query(), kv, kv, lambda s, b, h, q, k: s + bias[h, k], mods.causal(), options=TRITON)
    assert cache_info().traces == 2 and host.solved == 1 and prepared() == 1
    assert len({text for _, _, text in host.kernels}) == 1, "every index is proven"


def test_the_torch_backend_makes_one_plan(host):
    q = query(dtype=torch.float32)
    for length in range(1, 60):
        kv = grown(length, dtype=torch.float32).zero_()
        flex_decode(q.zero_(), kv, kv, mods.alibi(4), mods.causal())
    assert len({id(plan) for known in run._calls.values() for plan in known.plans.values()}) == 1 and host.solved == 1


def test_memory_does_not_grow(host):
    """`FLEXDECODE_EXAMPLES=100000 pytest tests/unit/test_new_lengths.py -k memory_does` tries as many."""
    q = query()
    for length in range(1, LENGTHS):
        kv = grown(length)
        flex_decode(q, kv, kv, mods.alibi(4), mods.sliding_window(length), options=TRITON)
    assert sum(len(known.plans) for known in run._calls.values()) == 256
    assert prepared() <= 3
    assert all(len(memo) <= 8 for memo in memos._memos)
    clear_cache()
    assert not run._calls and not any(memos._memos)


# --- Proofs are looked at again ---------------------------------------------------------------------------------------


def test_an_index_that_a_longer_sequence_leads_out_of_its_tensor(host):
    for length in (2999, 3000, 3001, 2998):
        kv = grown(length)
        flex_decode(query(), kv, kv, bias_of_the_table, options=TRITON)
    checks = ["outside=True" in launcher.first.form.kernel.built_from[2] for launcher in host.launched]
    assert checks == [False, False, True, False]


def test_a_proof_by_a_mask_is_not_carried_too_far(host):
    """The window is as long as the table, until it is longer."""
    attending = []
    for length, window in ((2000, 3000), (4000, 3000), (5000, 3001), (6000, 3000), (8000, 3001)):
        kv = grown(length)
        flex_decode(query(), kv, kv, distance, mods.sliding_window(window), options=TRITON)
        attending.append("outside=True" in host.launched[-1].first.form.kernel.built_from[2])
    assert attending == [False, False, True, False, True]


@settings(max_examples=60)
@given(st.data())
def test_memory_of_proofs_by_a_mask(data):
    """It gives what a proof from nothing gives, whatever was asked before."""
    clear_cache()
    lengths = data.draw(st.lists(st.integers(1, 6000), min_size=1, max_size=6))
    window, columns, tokens = (data.draw(st.integers(1, most)) for most in (4000, 4000, 3))
    bias = torch.zeros(4, columns)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[h, q_idx - kv_idx]

    mask_mod = data.draw(st.sampled_from([mods.sliding_window(window), mods.causal(), mods.streaming(3, window)]))
    graphs = [identify(kind, mod) for kind, mod in (("score_mod", score_mod), ("mask_mod", mask_mod))]
    (score, one), (mask, other) = (
        prepare.graph_of(kind, mod, torch.device("cpu"))
        for kind, mod in zip(("score_mod", "mask_mod"), graphs, strict=True)
    )
    for length in lengths:
        arguments = score, one.leaves, proofs.CallSizes(2, 4, tokens == 1, length), False, (mask, other.leaves)
        found = proofs.find_checks(*arguments)
        kept = dict(proofs._reaches)
        proofs._reaches.clear()
        assert proofs.find_checks(*arguments) == found, length
        proofs._reaches.clear()
        proofs._reaches.update(kept)


# --- A plan from what is prepared is the plan of a fresh call ---------------------------------------------------------


@settings(max_examples=60)
@given(st.data())
def test_a_reused_plan_is_a_fresh_one(data):
    """The same kernel and the same launch arguments, for shapes, strides, caches, captures and options at random."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        facts = data.draw(st.sampled_from([H200, DeviceFacts("cuda", 80, 108, 163 * 1024)]))
        host = Host(monkeypatch, facts)
        batch, heads, group, tokens = (data.draw(st.integers(1, most)) for most in (3, 2, 4, 3))
        dim = data.draw(st.sampled_from([16, 17, 40, 64, 128]))
        dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int8]))
        paged, lens = data.draw(st.booleans()), data.draw(st.sampled_from([None, "tensor", "number"]))
        layout = data.draw(st.sampled_from(["bhnd", "bnhd", "sliced", "key[:1]", "one tensor", "unaligned"]))
        chosen = data.draw(st.sampled_from([{}, {"num_splits": 3}, {"batch_invariant": True}, {"block_n": 32}]))
        options = DecodeOptions(backend="triton", **chosen)
        rows = heads * group
        score_family, mask_family = data.draw(st.sampled_from(MODS)), data.draw(st.sampled_from(MODS))
        grows, in_order = data.draw(st.booleans()), data.draw(st.sampled_from([None, (1, 2), (0, 1), (0, 2)]))
        fixed = score_family.make_score_mod(batch, rows, 300, tokens, "cpu")
        mask_mod = mask_family.make_mask_mod(batch, rows, 300, tokens, "cpu")
        q = torch.zeros(batch, rows, tokens, dim, dtype=torch.bfloat16 if dtype == torch.int8 else dtype)

        def dense(length, batch=batch):
            if layout == "bnhd":
                return torch.zeros(batch, length, heads, dim, dtype=dtype).transpose(1, 2)
            if layout == "sliced":
                return torch.zeros(batch, heads, length + 5, 2 * dim, dtype=dtype)[:, :, 2:-3, ::2]
            if layout == "unaligned":
                return torch.zeros(batch * heads * length * dim + 1, dtype=dtype)[1:].view(batch, heads, length, dim)
            return torch.zeros(batch, heads, length, dim, dtype=dtype)

        def arguments(length):
            found = {}
            if paged:
                key = dense(16, batch=7)
                found["page_table"] = torch.zeros(batch, -(-length // 16), dtype=torch.int32)
            else:
                key = dense(length)[:1] if layout == "key[:1]" else dense(length)
            value = key[..., :16] if layout == "one tensor" else torch.zeros_like(key)
            if dtype == torch.int8:
                kind = data.draw(st.sampled_from(["number", "heads", "tokens"]))
                scale = {"number": 0.5, "heads": torch.ones(heads), "tokens": torch.ones(key.shape[:3])}[kind]
                found |= {"k_scale": scale, "v_scale": scale}
            if lens == "number":
                found["kv_lens"] = data.draw(st.integers(0, length))
            elif lens or paged:
                found["kv_lens"] = torch.full((batch,), min(length, 9))
            if in_order is not None:  # two dimensions of the output have changed places in memory
                shape = torch.empty(batch, rows, tokens, value.shape[3], dtype=q.dtype).transpose(*in_order).shape
                found["out"] = torch.zeros(shape, dtype=q.dtype).transpose(*in_order)
            bias = torch.zeros(rows, length)
            mod = (lambda s, b, h, q_idx, k: s + bias[h, k]) if grows else fixed
            return (q, key, value, mod, mask_mod), found

        for length in data.draw(st.lists(st.integers(1, 700), min_size=2, max_size=5)):
            positional, named = arguments(length)
            flex_decode(*positional, options=options, **named)
            reused = numbers(host.launched[-1])
            kept = [(memo, dict(memo)) for memo in memos._memos]
            clear_cache()
            flex_decode(*positional, options=options, **named)
            assert numbers(host.launched[-1]) == reused
            for memo, entries in kept:
                memo.clear()
                memo.update(entries)
        clear_cache()


def test_results_of_a_cache_that_grows():
    """On the torch backend, from one key on, with proofs that end in between."""
    heads, dim = 4, 16
    q, keys, values = make_inputs(2, heads, 2, 1, 1500, dim)
    short = torch.randn(heads, 40)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + short[h, kv_idx] - 0.01 * (q_idx - kv_idx)

    looked_at = {1, 2, 15, 39, 40, 41, 64, 200, *random.Random(0).sample(range(300, 1000), 2), 1500}
    for length in [*range(1, 300), *sorted(n for n in looked_at if n >= 300)]:
        kv = keys[:, :, :length].contiguous(), values[:, :, :length].contiguous()
        out, lse = flex_decode(q, *kv, score_mod, mods.sliding_window(100), return_lse=True)
        if length in looked_at:
            assert_close_to_reference(out, lse, q, *kv, score_mod, mods.sliding_window(100))


# --- The number of splits ---------------------------------------------------------------------------------------------

FIT = st.sampled_from([1, 2, 3, 4])


@settings(max_examples=500)
@given(
    st.integers(0, 3000), st.integers(0, 2000), st.integers(0, 10**10), st.sampled_from([1, 4, 7, 108, 132, 148, 304]),
    FIT, st.tuples(st.booleans(), st.booleans(), st.booleans()), st.booleans(),
)  # fmt: skip
def test_the_best_division_is_found_without_trying_all(items, blocks, total_bytes, num_sms, fit, kind, is_float32):
    speeds, fit = (splits.FLOAT32_SPEEDS, min(fit, 3)) if is_float32 else (splits.HALF_SPEEDS, fit)
    work = splits.Work(items, blocks, total_bytes, num_sms, *kind, speeds)
    found = splits.divide(work, fit)
    assert 1 <= found.num_splits <= max(1, min(blocks, splits.MAX_SPLITS))
    assert 1 <= found.per_sm <= fit
    for per_sm in range(1, fit + 1) if items else ():
        for number in range(
            1, max(1, min(blocks, splits.MAX_SPLITS, splits.MAX_WAVES * per_sm * num_sms // items)) + 1
        ):
            programs = items * number
            is_needed = per_sm == 1 or programs > (per_sm - 1) * num_sms
            if is_needed and (work.long_waves or per_sm == fit or programs <= per_sm * num_sms):
                time = splits.microseconds(work, splits.Division(number, per_sm))
                assert splits.microseconds(work, found) <= 1.02 * time


def test_a_given_number_of_splits_is_kept():
    work = splits.Work(40, 193, 250_000_000, 132, long_waves=True)
    assert splits.divide(work, 4, 3) == (3, 1)
    assert splits.divide(work, 4, 6) == (6, 2)
    assert splits.divide(work, 4, 9) == (9, 3)
    assert splits.divide(splits.Work(0, 0, 0, 132), 2) == (1, 1)


# Items, keys of each, bytes of a key and its value, and the fastest division of those that were measured on an H200.
MEASURED = [
    (256, 256, 512, (1, 2)),  # two programs on each multiprocessor 11.2 us, one 13.7
    (128, 8192, 512, (1, 1)),  # one program on each multiprocessor 123.3 us, two 125.1, three 125.7
    (192, 777, 512, (2, 3)),  # 192 programs on 132 multiprocessors 26.4 us, 384 programs 24.8
    (96, 6000, 512, (4, 3)),  # 96 programs 84.2 us, 192 programs 75.3, 384 programs 72.9
    (40, 12345, 512, (3, 1)),  # 120 programs 61.9 us, 240 programs 63.7, 360 programs 65.0
    (384, 2048, 256, (1, 3)),  # one wave of three programs 49.3 us, 768 programs 60.5
    (80, 5000, 256, (3, 2)),  # 80 programs 35.8 us, 240 programs 28.9, 320 programs 31.2, 480 programs 29.6
    (1024, 2000, 512, (1, 2)),  # two programs on each multiprocessor 239.4 us, one 247.6
]


def test_long_sequences_of_different_lengths_have_a_multiprocessor_for_themselves():
    """Measured on an H200: 128 sequences of 200 to 8000 tokens, one program 526.7 us, two 554.8; of 64 to 1024 tokens,
    256 sequences, one program 155.0 us, two 135.6."""
    for items, keys, fastest in ((1024, 8000, (1, 1)), (2048, 1024, (1, 2))):
        work = splits.Work(items, keys // 64, items * keys * 512, 132, items_differ=True, long_waves=True)
        assert splits.divide(work, 2) == fastest


@pytest.mark.parametrize(("items", "keys", "size", "fastest"), MEASURED)
def test_the_fastest_measured_division_is_chosen(items, keys, size, fastest):
    work = splits.Work(items, -(-keys // 64), items * keys * size, 132, long_waves=True)
    assert splits.divide(work, 4) == fastest


# The same for float32.
MEASURED_FLOAT32 = [
    (128, 512, 1024, (1, 1)),  # 128 programs 21.5 us, 256 programs 23.3
    (256, 256, 1024, (1, 2)),  # two programs on each multiprocessor 21.4 us, one 26.5
    (32, 4096, 1024, (8, 2)),  # 128 programs 39.0 us, 256 programs 37.6, 384 programs 40.1
    (40, 12345, 1024, (6, 2)),  # 120 programs 142.2 us, 240 programs 125.4
    (384, 2048, 512, (1, 3)),  # one program on each multiprocessor 120.4 us, two 125.8, three 104.4
    (64, 8192, 512, (4, 2)),  # 128 programs 79.7 us, 256 programs 68.0, 384 programs 73.4
    (80, 5000, 512, (3, 2)),  # 80 programs 97.9 us, 240 programs 57.4
]


@pytest.mark.parametrize(("items", "keys", "size", "fastest"), MEASURED_FLOAT32)
def test_the_fastest_measured_division_of_float32_is_chosen(items, keys, size, fastest):
    work = splits.Work(items, -(-keys // 64), items * keys * size, 132, long_waves=True, speeds=splits.FLOAT32_SPEEDS)
    assert splits.divide(work, 3) == fastest
