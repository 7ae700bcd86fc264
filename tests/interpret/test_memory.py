"""Nothing outside of a tensor is read or written: each one lies between pages of memory that kill the process."""

import sys

import memory_cases as cases
import numpy as np
import packed_cases
import pytest
import torch
from triton.runtime import interpreter

from flexdecode import DecodeOptions, clear_cache, flex_decode, mods
from flexdecode.call import checks
from flexdecode.call.device import DeviceFacts
from flexdecode.codegen import kernels
from flexdecode.runtime import launch, plan, prepare

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory by mprotect"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),  # the interpreter's row maximum
]

OTHER_KERNEL = "latents"  # the kernel for many latents needs a Hopper GPU; here the general one would run


@pytest.mark.parametrize("name", [name for name in cases.CALLS if not name.startswith(OTHER_KERNEL)])
def test_calls(name):
    cases.check_call(cases.CALLS[name], "cpu")


@pytest.mark.parametrize("name", [name for name in cases.PACKED if not name.startswith(OTHER_KERNEL)])
def test_packed_calls(name):
    cases.check_packed(name, "cpu")


@pytest.mark.parametrize("kind", ["contiguous", "pages of 1", "pages of 4", "pages of 16"])
@pytest.mark.parametrize("stored", [torch.float16, torch.int8], ids=str)
def test_appends(stored, kind):
    cases.check_append(kind, stored, "cpu")


@pytest.mark.parametrize(("num_parts", "v_head_dim"), [(2, 20), (9, 64), (3, 300)])
def test_merges(num_parts, v_head_dim):
    cases.check_merge(num_parts, v_head_dim, "cpu")


class Watched:
    """Sees the address of every load and store of the interpreter, and whether it lies in a known tensor."""

    def __init__(self, monkeypatch):
        self.known, self.outside = [], []
        builder = interpreter.InterpreterBuilder
        for name, mask_at in (("create_masked_load", 1), ("create_masked_store", 2)):
            monkeypatch.setattr(builder, name, self.watch(getattr(builder, name), name, mask_at))
        find = launch.TritonLauncher._workspace

        def workspace(launcher, stream):
            found = find(launcher, stream)
            self.add(*launch._workspaces.kept.values())
            return found

        monkeypatch.setattr(launch.TritonLauncher, "_workspace", workspace)
        run = launch.TritonLauncher.__call__

        def launched(launcher, call):
            self.add(*call.inputs, call.out, call.lse, *call.score_leaves, *call.mask_leaves)
            return run(launcher, call)

        monkeypatch.setattr(launch.TritonLauncher, "__call__", launched)

    def add(self, *tensors):
        storages = [x.untyped_storage() for x in tensors if isinstance(x, torch.Tensor)]
        self.known += [(storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages]

    def watch(self, access, name, mask_at):
        def run(builder, pointers, *rest):
            addresses, mask = np.broadcast_arrays(pointers.data.astype(np.uint64), rest[mask_at - 1].data)
            addresses = addresses[mask]
            inside = np.zeros(addresses.shape, bool)
            for start, end in self.known:
                inside |= (addresses >= start) & (addresses < end)
            if not inside.all():
                self.outside.append(name)
            return access(builder, pointers, *rest)

        return run


@pytest.mark.parametrize("width", [64, 200])
@pytest.mark.parametrize("columns", ["side by side", "apart", "the same"])
def test_lines_that_are_asked_for_lie_in_the_tensors(columns, width, monkeypatch):
    """Before it waits, a program of a GPU asks for lines of query and caches. The interpreter cannot do that."""
    shapes = (1, 2, 1, width), (1, 2, 40, width), (1, 2, 40, width)
    made = {
        "side by side": torch.zeros,
        "apart": lambda shape: torch.zeros(*shape[:2], width, shape[2]).mT,
        "the same": lambda shape: torch.zeros(*shape[:3], 1).expand(shape),
    }[columns]
    query, key, value = map(made, shapes)
    asked = []

    def prefetch(pointers, inside):
        addresses, mask = np.broadcast_arrays(pointers.handle.data, inside.handle.data)
        asked.extend(addresses[mask.astype(bool)].tolist())

    def load(path, load=kernels.load_module):
        module = load(path)
        on_gpus = {"prefetch": prefetch, "gdc_wait": lambda: None, "gdc_launch_dependents": lambda: None}
        vars(module).update(on_gpus, exp2=lambda x, C: module.tl.exp2(x))
        return module

    clear_cache()
    monkeypatch.setattr(DeviceFacts, "has_pdl", property(lambda facts: True))
    monkeypatch.setattr(DeviceFacts, "has_descriptors", property(lambda facts: False))
    monkeypatch.setattr(kernels, "load_module", load)
    flex_decode(query, key, value, options=DecodeOptions(backend="triton", num_splits=2))
    clear_cache()
    for tensor in (query, key, value):
        start = tensor.data_ptr()
        end = start + tensor.untyped_storage().nbytes()
        assert any(start <= address < end for address in asked)
        asked = [address for address in asked if not start <= address < end]
    assert not asked


@pytest.mark.parametrize("chosen", [{"num_splits": 3}, {"schedule": "balanced"}, {}], ids=str)
@pytest.mark.parametrize("kv_lens", [(80, 30, 40), (300, 5, 0)], ids=str)
def test_partial_results_of_packed_queries(kv_lens, chosen, monkeypatch):
    """Both launches of the first pass have places in one workspace, and some rows are of no sequence."""
    clear_cache()
    facts = DeviceFacts("cpu", "interpreter", num_sms=132, shared_memory=227 * 1024)
    monkeypatch.setattr(prepare, "device_facts", lambda _: facts)
    watched = Watched(monkeypatch)
    call = packed_cases.draw((70, 1, 9), kv_lens, Hq=4, Hkv=2, dtype=torch.float16, before=1, after=2)
    packed_cases.check(call, None, mods.causal(), options=DecodeOptions(backend="triton", block_n=16, **chosen))
    clear_cache()
    assert not watched.outside


@pytest.mark.parametrize("chosen", [{"num_splits": 1}, {"num_splits": 2}, {"schedule": "balanced"}, {}], ids=str)
@pytest.mark.parametrize("totals", [(0, 19, 2, 19), (0, 20, 0, 20), (7, 3, 30, -2), (9, 0, 0, 0)], ids=str)
def test_totals_that_do_not_ascend(totals, chosen, monkeypatch):
    """On a GPU they are not looked at. Some results mean nothing then, but nothing outside is accessed."""
    monkeypatch.setattr(plan, "check_all_lens", lambda *_: None)
    monkeypatch.setattr(checks, "check_all_lens", lambda *_: None)
    clear_cache()
    watched = Watched(monkeypatch)
    query, slopes = torch.randn(20, 8, 16), torch.randn(8)
    key, out = torch.randn(3, 1, 40, 16), torch.empty(8, 20, 16).transpose(0, 1)
    for hint in (None, 8):
        flex_decode(
            query, key, key, lambda s, b, h, q, k: s * slopes[h], mods.causal(), kv_lens=torch.tensor([40, 9, 30]),
            cu_seqlens_q=torch.tensor(totals, dtype=torch.int32), max_q_len=hint, sinks=slopes, out=out,
            return_lse=True, options=DecodeOptions(backend="triton", **chosen),
        )  # fmt: skip
    clear_cache()
    assert not watched.outside
