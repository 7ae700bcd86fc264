"""The kernel that merges attention over parts of the keys, on a GPU."""

import pytest
import torch
from unit.kv import test_merge as cases

from flexdecode.kv.merge import merge_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("cuts", cases.CUTS.values(), ids=cases.CUTS)
def test_parts_make_the_whole(cuts, dtype):
    cases.check_parts_make_the_whole(cuts, dtype, "cuda")


@pytest.mark.parametrize("place", [0, 2])
def test_a_sink_of_one_part(place):
    cases.check_a_sink_of_one_part(place, "cuda")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("num_parts", [1, 2, 8, 9, 17])
@pytest.mark.parametrize("v_head_dim", [20, 128])
def test_numbers(num_parts, v_head_dim, dtype):
    cases.check_numbers(num_parts, v_head_dim, dtype, "cuda")


@pytest.mark.parametrize("num_parts", [3, 10])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout, num_parts):
    cases.check_layouts(layout, num_parts, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("layout", "num_parts", "v_head_dim"), cases.PACKED)
def test_packed(layout, num_parts, v_head_dim, dtype):
    cases.check_packed(layout, num_parts, v_head_dim, dtype, "cuda")


def test_special_values():
    cases.check_special_values("cuda")


def test_magnitudes():
    cases.check_magnitudes("cuda")


def test_wide_and_many_rows():
    """Several programs side by side on the columns of a row, and more rows than run at a time."""
    outs, lses = cases.random_parts(2, (64, 32, 5, 300), torch.bfloat16, "cuda")
    cases.assert_merged(*merge_attention(outs, lses), outs, lses)


def test_sizes_make_no_new_kernel(monkeypatch):
    import triton

    merge_attention(*cases.random_parts(2, (2, 4, 2, 64), torch.float16, "cuda"))
    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **details: compiled.append(details))
    for B, Hq, Q in [(1, 1, 1), (3, 5, 1), (16, 16, 16), (7, 3, 2)]:  # log-sum-exps of the second part: any alignment
        outs, lses = cases.random_parts(2, (B, Hq, Q, 64), torch.float16, "cuda")
        cases.assert_merged(*merge_attention(outs, lses), outs, lses)
    assert not compiled


def test_in_a_cuda_graph_and_on_another_stream():
    outs, lses = cases.random_parts(9, (4, 8, 1, 128), torch.bfloat16, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cases.assert_merged(*merge_attention(outs, lses), outs, lses)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = merge_attention(outs, lses)
    outs.copy_(outs.flip(0).nan_to_num(2.0))
    graph.replay()
    cases.assert_merged(out, lse, outs, lses)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_current():
    outs, lses = cases.random_parts(2, (2, 4, 1, 64), torch.float16, "cuda:1")
    out, lse = merge_attention(outs, lses)
    assert torch.cuda.current_device() == 0 and out.device == outs.device
    cases.assert_merged(out, lse, outs, lses)
