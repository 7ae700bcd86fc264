"""Compiled kernels in the store, and kernels that compile in a thread of their own."""

import contextlib
import gc
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import flexdecode
from flexdecode import DecodeOptions, cache_info, mods, warmup
from flexdecode.ahead import loaded
from flexdecode.ahead.folder import Entry
from flexdecode.call.device import KNOWN_DEVICES
from flexdecode.codegen import binaries, entries, kernels
from flexdecode.codegen.background import Task, uncollected
from flexdecode.codegen.binaries import Binary, binary_identity, find_binary, keep_binary, launch_of
from flexdecode.codegen.identity import COMBINE, SPLIT
from flexdecode.errors import CompileError, KernelFolderError, SharedMemoryError
from flexdecode.memos import Bounded
from flexdecode.runtime import ahead

H200 = KNOWN_DEVICES["H200"][0]
ENTRY = Entry(SPLIT, "", None, "", "module", "P(l)x", 128, 100, True, [{"swizzle": 3, "block_size": [64, 32]}], ["out"])
META = [torch.empty(2, h, n, 64, dtype=torch.bfloat16, device="meta") for h, n in ((8, 1), (2, 4096), (2, 4096))]


@pytest.fixture(autouse=True)
def store(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", str(tmp_path / "store"))
    flexdecode.clear_cache()
    yield tmp_path / "store"
    flexdecode.clear_cache()


@pytest.fixture
def gpu(monkeypatch):
    """Calls are compiled for an H200 that is not there. Gives what is compiled and launched, as it happens."""
    happened = SimpleNamespace(compiled=[], launched=[], threads=[], refuse=None, read=True, wait=0.0, text="compiler")

    def compile_pass(module, spec, facts, combine, when_read):
        happened.compiled.append(COMBINE if combine else SPLIT)
        happened.threads.append(threading.current_thread())
        if happened.read:
            when_read(0.0)
        time.sleep(happened.wait)
        if happened.refuse is not None and not combine:
            raise happened.refuse
        return SimpleNamespace()

    def entry_of(compiled, module, spec, kernel, text):
        return Entry(kernel, text, source="m", form="P", arguments=["out"]), b"image of " + kernel.encode()

    def launch_of(binary, device):
        happened.launched.append((binary.entry.kernel, binary.image, device))
        return SimpleNamespace(source=Path("m.py"), entry=binary.entry, encode_descriptors=None)

    names = SimpleNamespace(decode_combine=None, decode_split=None)
    monkeypatch.setattr(ahead, "device_facts", lambda device: H200)
    monkeypatch.setattr(kernels, "_gpu", lambda spec, facts: 5)
    monkeypatch.setattr(kernels, "compile_pass", compile_pass)
    monkeypatch.setattr(kernels, "load_module", lambda path: names)
    monkeypatch.setattr(kernels, "launch_of", launch_of)
    monkeypatch.setattr(kernels, "start_tools", lambda facts: Task(lambda: None))
    monkeypatch.setattr(entries, "entry_of", entry_of)
    monkeypatch.setattr(binaries, "compiler_text", lambda target: happened.text)
    return happened


def warm(mod=None, **more):
    warmup(*META, mod, options=DecodeOptions(backend="triton", num_splits=4), **more)


# --- Kernels on disk --------------------------------------------------------------------------------------------------


def test_a_kernel_is_found_as_it_was_kept(store):
    keep_binary("one", Binary(ENTRY, b"\x7fELF\n\x00{}\n"))
    assert find_binary("one") == Binary(ENTRY, b"\x7fELF\n\x00{}\n")
    assert find_binary("other") is None


def test_without_an_identity_nothing_is_kept(store):
    keep_binary(None, Binary(ENTRY, b"image"))
    assert find_binary(None) is None and not store.exists()


@pytest.mark.parametrize("content", [b"", b"\n", b"[]\nimage", b'{"kernel": "x"}\nimage', b"\xff\nimage"])
def test_a_file_that_is_no_kernel_is_not_taken(store, content):
    kernels.store.keep("kernels", "one", content)
    assert find_binary("one") is None


def test_a_damaged_kernel_is_not_taken(store):
    keep_binary("one", Binary(ENTRY, b"image"))
    (file,) = (store / "kernels").iterdir()
    file.write_bytes(file.read_bytes() + b"!")
    assert find_binary("one") is None


def test_another_process_compiles_nothing(gpu):
    warm(mods.softcap(20.0))
    assert sorted(gpu.compiled) == [COMBINE, SPLIT] and len(gpu.launched) == 2
    assert (cache_info().compilations, cache_info().disk_hits) == (1, 0)
    flexdecode.clear_cache()
    gpu.compiled.clear()
    warm(mods.softcap(30.0))  # a captured number is no part of a kernel
    assert gpu.compiled == [] and gpu.launched[:2] == gpu.launched[2:]
    assert gpu.launched[0] == (SPLIT, b"image of decode_split", 5)
    info = cache_info()
    assert (info.compilations, info.disk_hits, info.generations) == (1, 1, 0)


def test_another_mod_shares_the_second_pass(gpu):
    warm(mods.softcap(20.0))
    flexdecode.clear_cache()
    gpu.compiled.clear()
    warm(mods.alibi(8))
    assert gpu.compiled == [SPLIT]


def test_calls_of_other_kinds_share_the_second_pass(gpu):
    warm()
    flexdecode.clear_cache()
    gpu.compiled.clear()
    query, *cache = META
    options = DecodeOptions(backend="triton", num_splits=4)
    warmup(query, *(x.to(torch.int8) for x in cache), k_scale=1.0, v_scale=1.0, options=options)
    assert gpu.compiled == [SPLIT]


@pytest.mark.parametrize("text", ["another compiler", None])
def test_another_compiler_compiles_again(gpu, text):
    """None: a setting asks Triton to compile in any case."""
    warm()
    flexdecode.clear_cache()
    gpu.compiled.clear()
    gpu.text = text
    warm()
    assert sorted(gpu.compiled) == [COMBINE, SPLIT]


def test_what_is_on_disk_counts_as_a_compilation_where_these_are_forbidden(gpu):
    warm()
    flexdecode.clear_cache()
    with flexdecode.forbid_compilation(), pytest.raises(flexdecode.CompilationForbiddenError):
        warm()
    assert len(gpu.compiled) == len(gpu.launched) == 2


def test_a_kernel_that_does_not_fit_is_remembered(gpu):
    """Another process goes on to the smaller one at once."""
    gpu.refuse = SharedMemoryError("needs 300000 bytes")
    for expected in (1, 0):
        gpu.compiled.clear()
        flexdecode.clear_cache()
        with pytest.raises(SharedMemoryError, match="needs 300000 bytes"):
            warmup(*META, options=DecodeOptions(backend="triton", num_splits=4, block_n=128))
        assert gpu.compiled.count(SPLIT) == expected


def test_a_failure_is_not_kept(gpu, store):
    gpu.refuse = CompileError("no")
    for _ in range(2):
        with pytest.raises(CompileError, match="no"):
            warm()
    assert gpu.compiled.count(SPLIT) == 2


def test_what_the_helper_cannot_launch_is_launched_by_triton(gpu, monkeypatch, store):
    def refuse(*_):
        raise CompileError("needs scratch memory")

    launched = []
    monkeypatch.setattr(entries, "entry_of", refuse)
    monkeypatch.setattr(kernels, "_pass", lambda module, spec, facts, combine: launched.append(combine))
    warm()
    assert launched == [False, True] and gpu.launched == [] and not (store / "kernels").exists()


def test_the_memory_of_the_device_is_part_of_the_identity(gpu):
    h100, smaller = KNOWN_DEVICES["H100"][0], SimpleNamespace(backend="cuda", arch=90, shared_memory=1000)
    assert binary_identity("text", H200) == binary_identity("text", h100) != binary_identity("text", smaller)
    assert binary_identity("another text", H200) != binary_identity("text", H200)


# --- The C helper -----------------------------------------------------------------------------------------------------


class Helper:
    def __init__(self):
        self.loaded = []

    launch = encode = None

    def load(self, *arguments):
        self.loaded.append(arguments)


@pytest.fixture
def helper(monkeypatch, tmp_path):
    """A helper in place of that in C, and no launches of other tests."""
    found = Helper()
    monkeypatch.setattr(binaries, "build_launcher", lambda: b"built")
    monkeypatch.setattr(binaries, "import_launcher", lambda path, checksum: found)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(binaries, "_launches", {})
    binaries._helper.cache_clear()
    yield found
    binaries._helper.cache_clear()


def test_machine_code_is_loaded_once_into_each_device(helper, store):
    launches = [launch_of(Binary(ENTRY, b"image"), device) for device in (0, 1, 0)]
    assert launches[0] is launches[2] is not launches[1]
    assert [(image, form, device) for _, _, image, form, device, *_ in helper.loaded] == [
        (b"image", "P(l)x", 0), (b"image", "P(l)x", 1),
    ]  # fmt: skip
    assert launches[0].source == store / "modules" / "module.py"


def test_the_helper_is_built_once_for_all_processes(helper, store, monkeypatch):
    first = binaries._helper().result()
    binaries._helper.cache_clear()
    monkeypatch.setattr(binaries, "build_launcher", lambda: pytest.fail("built again"))
    assert binaries._helper().result() == first and first.read_bytes() == b"built" and first.suffix == ".so"


@pytest.mark.parametrize("error", [CompileError("no C compiler"), KernelFolderError("no lock")])
def test_without_a_helper_there_is_no_launch(helper, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(binaries, "import_launcher", fail)
    assert launch_of(Binary(ENTRY, b"image"), 0) is None


# --- Threads ----------------------------------------------------------------------------------------------------------


def test_a_task_gives_what_its_function_gives_or_raises():
    def fail():
        raise ValueError("wrong")

    for start in (True, False):
        task = Task(lambda: 5), Task(fail)
        if start:
            assert [each.start() for each in task] == [*task]
        assert task[0].result() == 5
        for _ in range(2):
            with pytest.raises(ValueError, match="wrong"):
                task[1].result()


@pytest.mark.parametrize("delay", [None, 0.0, 0.01, 0.2])
def test_a_task_runs_once(delay):
    """Where its result is asked for, if no thread has begun by then."""
    ran = []
    task = Task(lambda: ran.append(threading.current_thread()))
    if delay is not None:
        for _ in range(2):
            task.start(delay)
        time.sleep(0.1)
    for _ in range(2):
        task.result()
    time.sleep(0.2)
    (thread,) = ran
    assert (thread is threading.current_thread()) == (delay in (None, 0.2))


def test_both_passes_are_compiled_at_once(gpu):
    gpu.wait = 0.2
    warm()
    assert sorted(gpu.compiled) == [COMBINE, SPLIT] and len(set(gpu.threads)) == 2
    assert gpu.threads[gpu.compiled.index(SPLIT)] is threading.current_thread()
    assert [kernel for kernel, *_ in gpu.launched] == [SPLIT, COMBINE] and not kernels._started


@pytest.mark.parametrize("refuse", [None, CompileError("no")])
def test_a_second_pass_waits_until_the_first_one_is_read(gpu, refuse):
    """If Triton finds the first pass in its own store, or cannot read it, the second pass needs no thread."""
    gpu.read, gpu.refuse = False, refuse
    with contextlib.nullcontext() if refuse is None else pytest.raises(CompileError, match="no"):
        warm()
    gpu.refuse = None
    warm()
    assert gpu.compiled[-1] == COMBINE and set(gpu.threads) == {threading.current_thread()}
    assert [kernel for kernel, *_ in gpu.launched] == [SPLIT, COMBINE] and not kernels._started


def test_nothing_is_compiled_in_a_thread_that_a_folder_may_have(gpu, monkeypatch):
    monkeypatch.setattr(loaded, "any_folder", lambda: True)
    warm()
    assert set(gpu.threads) == {threading.current_thread()}


@pytest.fixture
def wanted(gpu, monkeypatch):
    """What `find_kernel` gets for the first pass of a call. Nothing is compiled yet."""
    given, find = [], ahead.find_kernel
    with monkeypatch.context() as patch:
        patch.setattr(ahead, "find_kernel", lambda *arguments: given.append(arguments) or find(*arguments))
        warm()
    flexdecode.clear_cache()
    for path in kernels.store.stored_files("kernels"):
        path.unlink()
    gpu.compiled.clear()
    gpu.threads.clear()
    return given[0]


def test_a_first_pass_is_compiled_before_it_is_asked_for(gpu, wanted):
    gpu.wait = 0.2
    for _ in range(2):
        kernels.start_kernel(*wanted)
    found = kernels.find_kernel(*wanted)
    kernels.start_kernel(*wanted)
    assert kernels.find_kernel(*wanted) is found and not kernels._started
    assert gpu.compiled == [SPLIT] and threading.current_thread() not in gpu.threads
    assert cache_info().compilations == 1


def test_what_fails_in_a_thread_fails_where_it_is_asked_for(gpu, wanted):
    gpu.refuse = CompileError("no")
    kernels.start_kernel(*wanted)
    with pytest.raises(CompileError, match="no"):
        kernels.find_kernel(*wanted)
    gpu.refuse = None
    assert kernels.find_kernel(*wanted) and gpu.compiled == [SPLIT, SPLIT] and not kernels._started


def test_a_thread_that_needs_the_lock_is_waited_for_without_it(gpu, wanted, monkeypatch):
    compile_pass = kernels.compile_pass

    def compile_and_remember(*arguments):
        compiled = compile_pass(*arguments)
        Bounded(limit=1).add("a fact", "in a memo")
        return compiled

    monkeypatch.setattr(kernels, "compile_pass", compile_and_remember)
    gpu.wait = 0.2
    kernels.start_kernel(*wanted)
    finder = threading.Thread(target=kernels.find_kernel, args=wanted, daemon=True)
    finder.start()
    finder.join(10)
    assert not finder.is_alive()


def test_nothing_is_started_where_compilation_is_forbidden(gpu, wanted):
    with flexdecode.forbid_compilation():
        kernels.start_kernel(*wanted)
    assert not kernels._started and not gpu.compiled


def test_without_splits_there_is_no_second_pass(gpu):
    warmup(*META, options=DecodeOptions(backend="triton", num_splits=1))
    assert gpu.compiled == [SPLIT]


def test_gpus_do_not_share_the_handle_of_a_second_pass(gpu, monkeypatch):
    """Each GPU has its own copy of the machine code."""
    for index in (0, 1):
        monkeypatch.setattr(kernels, "_gpu", lambda spec, facts: spec.signature.device.index)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda index=index: index)
        warm()
    assert {(kernel, device) for kernel, _, device in gpu.launched} == {
        (SPLIT, 0), (COMBINE, 0), (SPLIT, 1), (COMBINE, 1),
    }  # fmt: skip


def test_garbage_is_collected_again_afterwards(gpu):
    assert gc.isenabled()
    warm()
    assert gc.isenabled()
    gpu.refuse = CompileError("no")
    with pytest.raises(CompileError):
        warm(mods.softcap(2.0))
    assert gc.isenabled()
    gc.disable()
    try:
        gpu.refuse = None
        warm(mods.softcap(2.0))
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_garbage_is_not_collected_until_the_last_thread_has_compiled(gpu):
    """The thread that ends first was the first or the last one to begin."""
    for order in ((0, 1), (1, 0)):
        begun, may_end = ([threading.Event(), threading.Event()] for _ in range(2))
        threads = []

        def compile_something(i, begun=begun, may_end=may_end):
            with uncollected:
                begun[i].set()
                may_end[i].wait(10)

        for i in range(2):
            threads.append(threading.Thread(target=compile_something, args=(i,)))
            threads[i].start()
            begun[i].wait(10)
        for i, is_enabled in zip(order, (False, True), strict=True):
            may_end[i].set()
            threads[i].join()
            assert gc.isenabled() is is_enabled
