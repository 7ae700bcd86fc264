"""vLLM's caches on a GPU: the orders in memory, float8 as bytes, CUDA graphs, and the host's part of a step."""

import pytest
import server_steps as steps
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flexdecode import cache_info
from flexdecode.integrations.vllm.attend import LayerAttention, LayerMods, OfModel, Step
from flexdecode.kv.slots import write_kv
from flexdecode.runtime.run import _calls as calls

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", steps.ORDERS)
def test_orders(order, dtype):
    steps.check_turns(order, dtype, "cuda", None)


@pytest.mark.parametrize("quantised", steps.DTYPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
def test_float8_as_bytes(order, dtype, quantised):
    steps.check_turns(order, dtype, "cuda", None, quantised)


class MadeOnTheHost(TorchDispatchMode):
    """Counts the tensors that operations make on the CPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor) and x.device.type == "cpu":
                self.found.append(function)
        return made


def prepared_calls():
    """How many calls were prepared from nothing."""
    return sum(len(known.prepared) for known in calls.values())


def batch(cache, counts, seed):
    """Tensors of one step, made before it: query, new keys and values, slots, and the sequences."""
    generator = torch.Generator("cuda").manual_seed(seed)
    total = sum(counts)
    query, key, value = (
        torch.randn(total, heads, steps.D, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (steps.Hq, steps.Hkv, steps.Hkv)
    )
    slots = torch.arange(total, device="cuda")
    starts = torch.tensor([0, *counts], device="cuda", dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lens = torch.tensor(counts, device="cuda", dtype=torch.int32) + seed % 7
    table = torch.arange(len(counts), device="cuda", dtype=torch.int32)[:, None].expand(-1, 8).contiguous()
    return query, key, value, slots, Step(starts, lens, table, 16 if max(counts) > 1 else 1)


def run(cache, attention, query, key, value, slots, step, out):
    keys, values = cache[..., : steps.D], cache[..., steps.D :]
    write_kv(key, value, keys, values, slots)
    attention.compute(query, keys, values, step, out=out)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # PyTorch calls the mode a prototype
def test_other_steps_need_nothing_of_the_host():
    """Once warm, other T, B and lengths: no synchronisation, tensor on the host, trace, preparation, kernel or load."""
    cache = torch.zeros(24, steps.Hkv, steps.PAGE, 2 * steps.D, device="cuda", dtype=torch.bfloat16)
    attention = LayerAttention(OfModel(steps.D**-0.5, window=64), None, None)
    slopes = torch.rand(steps.Hq, device="cuda")
    attention.user = LayerMods(lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx))
    shapes = [[1] * n for n in (1, 2, 3, 5, 8, 13)] + [[1, 4, 2], [3, 3], [9, 1, 1, 1], [16]]
    for seed, counts in enumerate(shapes):
        made = batch(cache, counts, seed)
        run(cache, attention, *made, torch.empty_like(made[0]))
    before, prepared_before = cache_info(), prepared_calls()
    others = [[1] * n for n in (4, 6, 7, 9, 11, 12)] + [[2, 4, 2, 1], [3, 5], [9, 1, 2, 1], [15], [1, 1, 14]]
    prepared = [batch(cache, counts, 50 + seed) for seed, counts in enumerate(others)]
    outs = [torch.empty_like(made[0]) for made in prepared]
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        with MadeOnTheHost() as on_host:
            for made, out in zip(prepared, outs, strict=True):
                run(cache, attention, *made, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = cache_info()
    assert not on_host.found and prepared_calls() == prepared_before
    assert (after.traces, after.generations, after.compilations, after.loads) == (
        before.traces, before.generations, before.compilations, before.loads,
    )  # fmt: skip
    assert all(out.isfinite().all() for out in outs)


def test_a_graph_of_a_step_is_replayed_with_other_sequences():
    """As vLLM's full CUDA graphs: sequences that fill up the batch have no tokens, and others change their lengths."""
    cache = steps.CacheOfLayer("LBHNC", torch.bfloat16, "cuda")
    attention = LayerAttention(OfModel(steps.D**-0.5, window=24), None, None)
    attention.user = LayerMods()
    B = 4
    static = {
        "query": torch.zeros(B, steps.Hq, steps.D, device="cuda", dtype=torch.bfloat16),
        "key": torch.zeros(B, steps.Hkv, steps.D, device="cuda", dtype=torch.bfloat16),
        "value": torch.zeros(B, steps.Hkv, steps.D, device="cuda", dtype=torch.bfloat16),
        "slots": torch.full((B,), -1, device="cuda", dtype=torch.int64),
        "starts": torch.zeros(B + 1, device="cuda", dtype=torch.int32),
        "lens": torch.zeros(B, device="cuda", dtype=torch.int32),
        "table": torch.full((B, steps.PAGES), -1, device="cuda", dtype=torch.int32),
        "out": torch.zeros(B, steps.Hq, steps.D, device="cuda", dtype=torch.bfloat16),
    }
    step = Step(static["starts"], static["lens"], static["table"], 1)

    def call():
        run(
            cache.kv_cache, attention, static["query"], static["key"], static["value"], static["slots"], step,
            static["out"],
        )  # fmt: skip

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    first = steps.Turn({0: 30, 1: 7, 2: 50})
    steps.take_turn(cache, attention, first)
    for sequences in ([0, 1, 2], [2, 0], [1], [0, 1, 2, 3], []):
        count = len(sequences)
        query, key, value = (cache.numbers(count, heads, steps.D) for heads in (steps.Hq, steps.Hkv, steps.Hkv))
        slots = [cache.take(sequence, 1)[0] for sequence in sequences]
        for place, sequence in enumerate(sequences):
            cache.add(sequence, key[place : place + 1], value[place : place + 1])
        for name, x in (("query", query), ("key", key), ("value", value)):
            static[name][:count] = x
        static["slots"].fill_(-1)[:count] = torch.tensor(slots, dtype=torch.int64)
        static["starts"].copy_(torch.arange(B + 1).clamp(max=count))
        static["lens"].zero_()[:count] = torch.tensor([cache.length(x) for x in sequences], dtype=torch.int32)
        static["table"].fill_(-1)[:count] = cache.table(sequences) if count else 0
        graph.replay()
        torch.cuda.synchronize()
        out = static["out"]
        for sequence, begin in zip(sequences, range(count), strict=True):
            key_rows, value_rows = (x[None].cpu() for x in cache.rows[sequence])
            one, found = (x[begin : begin + 1].transpose(0, 1)[None] for x in (query, out))
            window = lambda b, h, q, kv: (kv <= q) & (q - kv < 24)
            steps.assert_close_to_reference(found, None, one.cpu(), key_rows, value_rows, None, window)
