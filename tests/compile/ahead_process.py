"""Runs calls in a process whose driver is `fake_driver.c`: with Triton's launchers, or with the C helper.

    python ahead_process.py NAME FOLDER (save | triton | compile | disk | folder)

`save` writes the kernels of a call. The others run it twice, and the driver logs what it gets: `triton` with Triton's
launchers; `compile` and `disk` with the store, empty or not; `folder` with the folder of kernels. `disk` and `folder`
print the milliseconds of the first call, with `load`; no compiler can be started there.
"""

import contextlib
import ctypes
import json
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import triton
from no_compiler import no_compiler

import flexdecode
from flexdecode.ahead import loaded
from flexdecode.call.device import DeviceFacts
from flexdecode.codegen import entries, kernels
from flexdecode.runtime import prepare

H200 = DeviceFacts("cuda", 90, num_sms=132, shared_memory=227 * 1024)
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.5, 0.25, 0.125, 0.1], dtype=torch.float32)
WINDOW = 3000
NUM_FIRST = {"plain": 1, "mods": 1, "latents": 1, "quantised": 1, "paged": 2}  # kernels of the first pass


def alibi(score, b, h, q_idx, kv_idx):
    return score - SLOPES[h] * (q_idx - kv_idx)


def window(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (q_idx - kv_idx < WINDOW)


def _tensor(*shape, dtype=torch.bfloat16):
    return torch.zeros(shape, dtype=dtype)


def make_call(name):
    """The arguments of `flex_decode` for one of the calls that are compared."""
    lens = torch.tensor([4096, 100], dtype=torch.int32)
    kv = _tensor(2, 2, 4096, 128)
    if name == "plain":
        return (_tensor(2, 8, 1, 128), kv, torch.zeros_like(kv)), {"out": _tensor(2, 8, 1, 128)}
    if name == "mods":
        mods = {"score_mod": alibi, "mask_mod": window, "kv_lens": lens, "q_offset": 7}
        return (_tensor(2, 8, 1, 128), kv, torch.zeros_like(kv)), {**mods, "out": _tensor(2, 8, 1, 128)}
    if name == "latents":
        key = _tensor(2, 1, 4096, 576)
        return (_tensor(2, 128, 1, 576), key, key[..., :512]), {"out": _tensor(2, 128, 1, 512)}
    if name == "quantised":
        key = _tensor(2, 2, 4096, 128, dtype=torch.int8)
        scales = {"k_scale": 0.5, "v_scale": torch.ones(2, 2), "kv_lens": lens}
        return (_tensor(2, 8, 1, 128), key, torch.zeros_like(key)), {**scales, "out": _tensor(2, 8, 1, 128)}
    assert name == "paged"
    pool = _tensor(64, 2, 64, 128, dtype=torch.float16)
    given = {"page_table": torch.zeros(2, 64, dtype=torch.int32), "kv_lens": lens, "sinks": torch.zeros(8)}
    given |= {"cu_seqlens_q": torch.tensor([0, 300, 301], dtype=torch.int32), "return_lse": False}
    query = _tensor(301, 8, 128, dtype=torch.float16)
    return (query, pool, torch.zeros_like(pool)), {**given, "out": torch.zeros_like(query)}


@contextlib.contextmanager
def pretended_gpu():
    """Lets tensors of the CPU pass for those of the first GPU."""
    load = loaded.LoadedFolder.launch
    patches = [
        mock.patch.object(prepare, "device_facts", lambda device: H200),
        mock.patch.object(torch.cuda, "current_device", lambda: None),  # the index of the CPU
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, create=True),
        mock.patch.object(loaded.LoadedFolder, "launch", lambda self, name, device: load(self, name, 0)),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def the_helper_launches():
    """Lets kernels be launched as for tensors of the first GPU."""
    return mock.patch.object(kernels, "_gpu", lambda spec, facts: 0)


def use_driver():
    """Makes Triton use its driver for NVIDIA's GPUs, which this machine does not have."""
    from triton.backends.nvidia.driver import CudaDriver

    driver = CudaDriver()
    driver.get_current_device = lambda: 0
    driver.get_device_capability = lambda device: (9, 0)
    triton.runtime.driver.set_active(driver)


def tell_sizes(folder):
    """Tells the driver the sizes of the parameters of all kernels, in the order in which they are loaded."""
    tell = ctypes.CDLL("libcuda.so.1").fake_tell_sizes
    for entry in json.loads((Path(folder) / "manifest.json").read_text())["entries"].values():
        if entry["refusal"] is None:
            sizes = [entries.BYTES[kind] for kind in entry["form"] if kind in entries.BYTES] + [8, 8]
            tell(len(sizes), (ctypes.c_int * len(sizes))(*sizes))


def main(name, folder, way):
    """Does what the module says."""
    arguments, keywords = make_call(name)
    keywords["options"] = flexdecode.DecodeOptions(backend="triton")
    if way == "save":
        flexdecode.save_kernels(folder, *arguments, device=H200, **keywords)
        return
    tell_sizes(folder)
    with pretended_gpu():
        if way in ("triton", "compile"):
            use_driver()
            with contextlib.nullcontext() if way == "triton" else the_helper_launches():
                for _ in range(2):
                    flexdecode.flex_decode(*arguments, **keywords)
            return
        if way == "disk":
            with no_compiler(), the_helper_launches():
                start = time.perf_counter()
                flexdecode.flex_decode(*arguments, **keywords)
                spent = time.perf_counter() - start
                flexdecode.flex_decode(*arguments, **keywords)
            info = flexdecode.cache_info()
            assert (info.disk_hits, info.generations) == (NUM_FIRST[name], 0), info
            assert "sympy" not in sys.modules
            print(1000 * spent)
            return
        with no_compiler(), flexdecode.forbid_compilation():
            start = time.perf_counter()
            flexdecode.load(folder)
            flexdecode.flex_decode(*arguments, **keywords)
            spent = time.perf_counter() - start
            flexdecode.flex_decode(*arguments, **keywords)
        info = flexdecode.cache_info()
        assert info.loads and not info.compilations and not info.generations, info
        assert "sympy" not in sys.modules
        print(1000 * spent)


if __name__ == "__main__":
    main(*sys.argv[1:])
