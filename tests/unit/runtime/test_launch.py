"""What a launch hands to the kernels: each value in the place that the template's parameter of that name has."""

import ast
import contextlib
import gc
import weakref
from operator import itemgetter
from unittest import mock

import pytest
import torch

from flexdecode import DecodeOptions, clear_cache, flex_decode, mods
from flexdecode.call.device import DeviceFacts
from flexdecode.codegen.arguments import ARGUMENTS, DESCRIPTORS, SAME, SECOND_ARGUMENTS, WORKSPACE
from flexdecode.codegen.template import read_template
from flexdecode.runtime import prepare

B, HQ, HKV, Q, N, D, DV, PAGE = 2, 4, 2, 3, 64, 32, 16, 16
FACTS = DeviceFacts("cuda", 80, num_sms=108, shared_memory=163 * 1024)  # which loads without descriptors


def parameters(file, kernel):
    """The run-time parameters of a kernel."""
    functions = [node for node in ast.parse(read_template(file)).body if getattr(node, "name", "") == kernel]
    return [a.arg for a in functions[0].args.args if not a.arg.isupper()]


class _Pass:
    """Keeps the arguments of a launch, by the names that the template has for their places."""

    def __init__(self, names):
        self.names = names

    def __call__(self, grid, stream, arguments):
        self.grid, self.seen = grid, dict(zip(self.names, arguments, strict=True))


class _Kernel:
    def __init__(self, spec, facts, proven):
        self.run = _Pass(parameters("decode.py", "decode_split"))


class _Combine:
    block_dv, of_small = 16, False

    def __init__(self, spec, facts):
        names = parameters("combine.py", "decode_combine")
        self.run = _Pass(names)
        places = {row.name: i for i, row in enumerate(ARGUMENTS)}
        self.pick = itemgetter(*[places[name] for name in names if name in places])


@pytest.fixture
def kernels(monkeypatch):
    """The passes of the calls, which go the way of a GPU up to the launch."""
    made = []

    def find(kind):
        return lambda *of: made.append(kind(*of)) or made[-1]

    monkeypatch.setattr(prepare, "device_facts", lambda _: FACTS)
    monkeypatch.setattr(prepare, "find_kernel", find(_Kernel))
    monkeypatch.setattr(prepare, "find_combine", find(_Combine))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, create=True))
        yield made


def test_the_rows_have_the_order_of_the_template():
    assert [row.name for row in ARGUMENTS] == parameters("decode.py", "decode_split")
    assert [row.name for row in ARGUMENTS[DESCRIPTORS]] == ["key_descriptor", "value_descriptor"]
    assert [row.name for row in ARGUMENTS[WORKSPACE]] == ["partial_out", "partial_max", "partial_sum", "item_parts"]
    assert all(row.tensor is row.value is None for row in ARGUMENTS[SAME]) and ARGUMENTS[SAME][0].name == "stride_qb"
    second = parameters("combine.py", "decode_combine")
    assert {*second} <= {row.name for row in (*ARGUMENTS, *SECOND_ARGUMENTS)}
    assert second[-len(SECOND_ARGUMENTS) :] == [row.name for row in SECOND_ARGUMENTS]


def test_every_argument_lies_in_its_place(kernels):
    query, slopes = torch.randn(B, HQ, Q, D), torch.randn(HQ)
    key, value = (torch.ones(8, HKV, PAGE, width, dtype=torch.int8) for width in (D, DV))
    table = torch.arange(8, dtype=torch.int32).view(B, 4)
    kv_lens, q_lens = torch.tensor([N, 20], dtype=torch.int32), torch.tensor([3, 1], dtype=torch.int32)
    offset, sinks, k_scale = torch.tensor([5, 6]), torch.randn(HQ), torch.rand(B, HKV)
    out = torch.empty(B, Q, HQ, DV).transpose(1, 2)
    _, lse = flex_decode(
        query, key, value, mods.alibi(slopes), mods.sliding_window(9), page_table=table, kv_lens=kv_lens,
        q_lens=q_lens, q_offset=offset, sinks=sinks, k_scale=k_scale, v_scale=0.5, scale=0.25, return_lse=True,
        out=out, options=DecodeOptions(backend="triton", num_splits=2),
    )  # fmt: skip
    kernel, _ = kernels
    seen = kernel.run.seen
    tensors = {
        "query": query, "key": key, "value": value, "out": out, "lse": lse, "kv_lens": kv_lens, "q_lens": q_lens,
        "q_offset": offset, "sinks": sinks,
    }  # fmt: skip
    assert {name: seen[name] for name in tensors} == {name: x.data_ptr() for name, x in tensors.items()}
    for letter, tensor, dims in (("q", query, "bhmd"), ("k", key, "nd"), ("v", value, "nd"), ("o", out, "bhmd")):
        assert tuple(seen[f"stride_{letter}{dim}"] for dim in dims) == tensor.stride()[-len(dims) :]
    assert (seen["key_steps"], seen["value_steps"]) == (key.stride()[:2], value.stride()[:2])
    assert seen["page_table"] == (table.data_ptr(), 4, 8) and seen["block_lists"] == ()
    assert seen["key_scales"] == (k_scale.data_ptr(), *k_scale.stride()) and seen["value_scales"] == (0.5,)
    assert slopes.data_ptr() in seen["score_captures"] and seen["mask_captures"] == (9,)
    assert seen["scale"] == 0.25 and seen["key_descriptor"] is seen["value_descriptor"] is None
    sizes = {"batch": B, "num_kv_heads": HKV, "max_kv_len": N, "num_queries": Q, "num_splits": 2, "first_place": 0}
    assert {name: seen[name] for name in sizes} == sizes
    partials = [seen[name] for name in ("partial_out", "partial_max", "partial_sum")]
    assert len(set(partials)) == 3 and all(place % 16 == 0 for place in partials) and seen["item_parts"] is None


@pytest.mark.parametrize("out_given", [False, True], ids=["new", "out"])
def test_only_caches_that_are_loaded_in_pairs_have_other_strides(kernels, monkeypatch, out_given):
    """Their columns are counted two by two; those of the query and of the output are not."""
    monkeypatch.setattr(prepare, "device_facts", lambda _: DeviceFacts("cuda", 89, 142, 99 * 1024))
    query = torch.randn(B, HQ, Q, D, dtype=torch.float16)
    key, value = (torch.ones(B, HKV, N, width, dtype=torch.int8) for width in (D, 2 * D))
    new = torch.empty(B, HQ, Q, 2 * D, dtype=torch.float16)
    out = flex_decode(
        query, key, value, k_scale=0.5, v_scale=0.5, out=new if out_given else None,
        options=DecodeOptions(backend="triton", num_splits=2),
    )  # fmt: skip
    seen = kernels[0].run.seen
    for letter, strides in (("q", query.stride()), ("o", out.stride())):
        assert tuple(seen[f"stride_{letter}{dim}"] for dim in "bhmd") == strides
    assert (seen["stride_kn"], seen["stride_vn"], seen["stride_kd"], seen["stride_vd"]) == (D // 2, D, 1, 1)
    assert seen["key_steps"] == (HKV * N * D // 2, N * D // 2)
    combine = kernels[1].run.seen
    assert tuple(combine[f"stride_o{dim}"] for dim in "bhm") == out.stride()[:3]


def test_both_passes_share_what_they_share(kernels):
    flex_decode(
        torch.randn(B, HQ, Q, D), torch.randn(B, HKV, N, D), torch.randn(B, HKV, N, DV), kv_lens=torch.tensor([9, N]),
        options=DecodeOptions(backend="triton", schedule="balanced"),
    )  # fmt: skip
    split, combine = (one.run for one in kernels)
    assert combine.seen == {name: split.seen.get(name, combine.seen["num_splits"]) for name in combine.seen}
    assert split.seen["item_parts"] is not None and combine.grid == (B * HQ * Q, 1)


def test_a_plan_that_is_forgotten_leaves_no_kernel_behind(kernels):
    """No circle of references: the code on the GPU is unloaded at once, not at the next run of Python's collector."""
    key = torch.randn(B, HKV, N, D)
    flex_decode(torch.randn(B, HQ, Q, D), key, key, options=DecodeOptions(backend="triton", num_splits=2))
    kernel = weakref.ref(kernels.pop())
    gc.disable()
    try:
        clear_cache()
        assert kernel() is None
    finally:
        gc.enable()
