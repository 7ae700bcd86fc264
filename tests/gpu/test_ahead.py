"""Kernels of folders on a GPU: the same bits as kernels that Triton launches, without a compiler, at once."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from no_compiler import no_compiler

import flexdecode
from flexdecode import DecodeOptions, KernelFolderError, cache_info, clear_cache, flex_decode, mods
from flexdecode.ahead import loaded
from flexdecode.call.device import DeviceFacts, device_facts
from flexdecode.codegen import kernels

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(loaded, "_loaded", {})
    clear_cache()
    yield
    clear_cache()


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, dtype=torch.float32, device="cuda").to(dtype)


def make_call(name):
    """The arguments of `flex_decode` for one of the calls."""
    torch.manual_seed(0)
    lens = torch.tensor([4096, 100], dtype=torch.int32, device="cuda")
    key, value = normal(2, 2, 4096, 128), normal(2, 2, 4096, 128)
    query = normal(2, 8, 1, 128)
    if name == "plain":
        return (query, key, value), {}
    if name == "mods":
        return (query, key, value, mods.alibi(8, device="cuda"), mods.sliding_window(3000)), {"kv_lens": lens}
    if name == "offsets":
        starts = torch.tensor([5, 0], device="cuda")
        return (query, key, value), {"kv_lens": lens, "kv_starts": starts, "kv_offset": -3, "q_offset": 5000}
    if name == "ragged":
        query, key, value = normal(16, 8, 1, 128), normal(16, 2, 16384, 128), normal(16, 2, 16384, 128)
        return (query, key, value), {"kv_lens": torch.arange(1000, 17000, 1000, device="cuda", dtype=torch.int32)}
    if name == "latents":
        key = normal(2, 1, 4096, 576)
        return (normal(2, 128, 1, 576), key, key[..., :512]), {}
    if name == "int8":
        key, value = (torch.randint(-127, 128, (2, 2, 4096, 128), dtype=torch.int8, device="cuda") for _ in range(2))
        return (query, key, value), {"k_scale": 0.01, "v_scale": torch.ones(2, 2, device="cuda"), "kv_lens": lens}
    if name == "float32":
        return (query.float(), key.float(), value.float(), mods.softcap(20.0)), {"return_lse": True}
    assert name == "packed"  # two launches of the first pass
    pool = normal(64, 2, 64, 128, dtype=torch.float16), normal(64, 2, 64, 128, dtype=torch.float16)
    table = torch.arange(64, dtype=torch.int32, device="cuda").view(2, 32).repeat(1, 2)
    starts = torch.tensor([0, 300, 301], dtype=torch.int32, device="cuda")
    given = {"page_table": table, "kv_lens": lens, "cu_seqlens_q": starts, "sinks": torch.zeros(8, device="cuda")}
    return (normal(301, 8, 128, dtype=torch.float16), *pool), {**given, "return_lse": True}


CALLS = ["plain", "mods", "offsets", "ragged", "latents", "int8", "float32", "packed"]


def results(name):
    arguments, keywords = make_call(name)
    out = flex_decode(*arguments, **keywords)
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_bits_without_a_compiler(name, tmp_path):
    expected = results(name)
    arguments, keywords = make_call(name)
    saved = flexdecode.save_kernels(tmp_path / "kernels", *arguments, **keywords)
    clear_cache()
    assert flexdecode.load(tmp_path / "kernels").num_kernels == sum(bool(kernel.files) for kernel in saved) > 0
    with no_compiler(), flexdecode.forbid_compilation():
        for _ in range(3):
            for actual, wanted in zip(results(name), expected, strict=True):
                assert torch.equal(actual, wanted)
    info = cache_info()
    assert info.loads and not info.compilations and not info.generations


def test_shapes_alone_write_the_kernels_of_the_call(tmp_path):
    (query, key, value), _ = make_call("plain")
    shapes = (torch.empty_like(x, device="meta") for x in (query, key, value))
    flexdecode.save_kernels(tmp_path, *shapes, device=device_facts(query.device))
    flexdecode.load(tmp_path)
    with no_compiler(), flexdecode.forbid_compilation():
        flex_decode(query, key, value)


def test_a_cuda_graph_holds_kernels_of_a_folder(tmp_path):
    arguments, keywords = make_call("mods")
    out = torch.empty_like(arguments[0])
    keywords["out"] = out
    flexdecode.save_kernels(tmp_path, *arguments, **keywords)
    flexdecode.load(tmp_path)
    with no_compiler(), flexdecode.forbid_compilation():
        flexdecode.warmup(*arguments, **keywords)
        expected = flex_decode(*arguments, **keywords).clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            flex_decode(*arguments, **keywords)
    out.zero_()
    clear_cache()
    graph.replay()
    assert torch.equal(out, expected)


def test_another_thread_and_another_stream(tmp_path):
    expected = results("mods")
    arguments, keywords = make_call("mods")
    flexdecode.save_kernels(tmp_path, *arguments, **keywords)
    clear_cache()
    flexdecode.load(tmp_path)
    found = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            found.append(results("mods")[0])
            torch.cuda.synchronize()

    with flexdecode.forbid_compilation():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(tmp_path):
    arguments, keywords = make_call("plain")
    expected = flex_decode(*arguments, **keywords)
    flexdecode.save_kernels(tmp_path, *arguments, **keywords)
    clear_cache()
    flexdecode.load(tmp_path)
    with flexdecode.forbid_compilation():
        for device in ("cuda:1", "cuda:0"):
            actual = flex_decode(*(x.to(device) for x in arguments), **keywords)
            assert torch.equal(actual.to("cuda:0"), expected)


def test_a_folder_for_another_architecture_is_refused(tmp_path):
    shapes = (torch.empty(1, 2, n, 64, dtype=torch.float16, device="meta") for n in (1, 512, 512))
    other = 80 if torch.cuda.get_device_capability() != (8, 0) else 90
    flexdecode.save_kernels(tmp_path, *shapes, device=DeviceFacts("cuda", other, 108, 163 * 1024))
    with pytest.raises(KernelFolderError, match=rf"was compiled for sm_{other}, this GPU is sm_\d+: compile it again"):
        flexdecode.load(tmp_path)


def test_warming_up_shapes_leaves_nothing_to_compile():
    (query, key, value), _ = make_call("plain")
    flexdecode.warmup(*(torch.empty_like(x, device="meta") for x in (query, key, value)))
    assert cache_info().compilations == 1
    with flexdecode.forbid_compilation():
        flex_decode(query, key, value)
    assert cache_info().compilations == 1


def test_warming_up_tensors_prepares_the_whole_call():
    (query, key, value), _ = make_call("plain")
    flexdecode.warmup(query, key, value)
    hits = cache_info().hits
    with flexdecode.forbid_compilation():
        flex_decode(query, key, value)
    assert cache_info().hits == hits + 1


def test_a_miss_names_the_signature():
    (query, key, value), _ = make_call("plain")
    with (
        flexdecode.forbid_compilation(),
        pytest.raises(flexdecode.CompilationForbiddenError, match=r"signature: decode_split for .* query bfloat16"),
    ):
        flex_decode(query, key, value, options=DecodeOptions(block_n=16))
    assert not kernels._kernels


def test_an_append_that_would_compile_is_refused():
    from flexdecode.triton_api import standalone_kernel

    standalone_kernel.cache_clear()
    cache = flexdecode.KVCache(batch=2, num_kv_heads=2, head_dim=64, max_kv_len=64, dtype=torch.float16, device="cuda")
    new = normal(2, 2, 1, 64, dtype=torch.float16)
    with (
        flexdecode.forbid_compilation(),
        pytest.raises(flexdecode.CompilationForbiddenError, match=r"kernel append of append\.py"),
    ):
        cache.append(new, new)
    cache = flexdecode.KVCache(batch=2, num_kv_heads=2, head_dim=64, max_kv_len=64, dtype=torch.float16, device="cuda")
    cache.append(new, new)
    with flexdecode.forbid_compilation():
        cache.append(new, new)


def test_loading_and_the_first_call_are_quick(tmp_path):
    """Below 100 ms in a fresh process; the fastest of several counts."""
    command = [sys.executable, str(ROOT / "benchmarks" / "ahead.py"), "--child", str(tmp_path / "kernels")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*command, "save"], env=environment, check=True)
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "t"), "FLEXDECODE_CACHE_DIR": str(tmp_path / "f"), "CC": "false"}
    shown = [
        subprocess.run([*command, "load"], env=environment, check=True, capture_output=True, text=True).stdout
        for _ in range(4)
    ]
    milliseconds = [sum(map(float, line.split()[:2])) for line in shown]
    assert min(milliseconds) < 100, shown
    assert not (tmp_path / "t").exists() and not (tmp_path / "f").exists()
