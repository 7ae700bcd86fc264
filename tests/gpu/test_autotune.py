"""`options.autotune` on a GPU: right results, one measurement, and a schedule that is not slower than the default."""

import pytest
import torch
from support import assert_close_to_reference, make_inputs, paged

from flexdecode import DecodeOptions, clear_cache, explain, flex_decode, mods, prepare
from flexdecode.codegen.store import stored_files
from flexdecode.runtime import autotune

pytestmark = pytest.mark.gpu

AUTO = DecodeOptions(autotune=True)


@pytest.fixture
def rounds(monkeypatch, tmp_path):
    """The measurements of a test: how many launches took turns in each."""
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", str(tmp_path / "store"))
    counts, measure = [], autotune.time_launches

    def counted(runs, number, device):
        counts.append(len(runs))
        return measure(runs, number, device)

    monkeypatch.setattr(autotune, "time_launches", counted)
    clear_cache()
    yield counts
    clear_cache()


def test_the_result_and_what_is_kept(rounds):
    query, key, value = make_inputs(4, 16, 4, 1, 4000, 128, dtype=torch.bfloat16, device="cuda")
    score_mod, out = mods.alibi(16, device="cuda"), torch.empty_like(query)
    for _ in range(3):
        returned, lse = flex_decode(query, key, value, score_mod, return_lse=True, out=out, options=AUTO)
        assert returned is out
        assert_close_to_reference(out, lse, query, key, value, score_mod)
    measured = len(rounds)
    assert measured and len(stored_files("schedules")) == 1
    longer = [torch.cat([x, x[:, :, :50]], 2) for x in (key, value)]
    for length in (4001, 4050):
        cut = [x[:, :, :length].contiguous() for x in longer]
        out, lse = flex_decode(query, *cut, score_mod, return_lse=True, options=AUTO)
        assert_close_to_reference(out, lse, query, *cut, score_mod)
    clear_cache()  # as another process would begin
    flex_decode(query, key, value, score_mod, options=AUTO)
    assert len(rounds) == measured
    tuned = explain(query, key, value, score_mod, options=AUTO).tuned
    assert tuned.chosen_us <= tuned.default_us and len(tuned.tried) > 5
    assert all(0 < us < 1e5 for _, us in tuned.tried)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_few_keys_of_a_large_cache_of_pages(rounds, dtype):
    """A measurement fills the cache. The call itself reads only what it is given, and its inputs do not change."""
    query, key, value = make_inputs(3, 8, 2, 2, 2048, 64, dtype=dtype, device="cuda")
    lens = torch.tensor([100, 2, 1500], device="cuda", dtype=torch.int32)
    for x in (key, value):
        for b, length in enumerate(lens.tolist()):
            x[b, :, length:] = float("nan")
    (key_pages, table), (value_pages, _) = paged(key, 16), paged(value, 16)
    table = table.to("cuda", torch.int32)
    for b, length in enumerate(lens.tolist()):
        table[b, -(-length // 16) :] = -1
    before = table.clone(), lens.clone()
    more = {"kv_lens": lens, "page_table": table}
    out, lse = flex_decode(query, key_pages, value_pages, None, mods.causal(), return_lse=True, options=AUTO, **more)
    assert_close_to_reference(out, lse, query, key.nan_to_num(), value.nan_to_num(), None, mods.causal(), kv_lens=lens)
    assert rounds and torch.equal(table, before[0]) and torch.equal(lens, before[1])


def test_a_captured_graph_measures_nothing(rounds):
    query, key, value = make_inputs(2, 8, 2, 1, 1000, 64, dtype=torch.bfloat16, device="cuda")
    expected = flex_decode(query, key, value)  # compiles the default kernels, and nothing is measured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = flex_decode(query, key, value, options=AUTO)
    graph.replay()
    assert torch.equal(out, expected) and not rounds
    flex_decode(query, key, value, options=AUTO)
    measured = len(rounds)
    assert measured
    step = prepare(query, key, value, options=AUTO)
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        stepped = step(query)
    graph.replay()
    assert torch.equal(stepped, flex_decode(query, key, value, options=AUTO)) and len(rounds) == measured
