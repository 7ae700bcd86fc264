"""Kernels of folders: written without a GPU, launched exactly as Triton launches them, without a compiler."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from compile.compiling import DEVICES, meta_inputs

import flexdecode
from flexdecode import CompilationForbiddenError, CompileError, DecodeOptions, KernelFolderError, triton_api
from flexdecode.ahead import loaded
from flexdecode.call.device import DeviceFacts
from flexdecode.codegen import entries, writer
from flexdecode.codegen.compile import compile_pass
from flexdecode.codegen.template import template_folder
from flexdecode.errors import SharedMemoryError
from flexdecode.runtime import prepare
from flexdecode.triton_api import cuda_headers, has_gluon

HERE = Path(__file__).parent
CALLS = ["plain", "mods", "quantised", "paged", *(["latents"] if has_gluon() else [])]


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """The folder of a `libcuda.so.1` that logs its calls."""
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-I{cuda_headers()}", HERE / "fake_driver.c", "-o", folder / "libcuda.so.1"],
        check=True,
    )
    for other in ("libcuda.so", "libamdhip64.so"):  # Triton 3.5 links the first one
        (folder / other).symlink_to("libcuda.so.1")
    return folder


def run(name, folder, way, driver=None, **variables):
    """What `ahead_process.py` prints, and what the driver logged."""
    log = folder.parent / f"{name}-{way}.log"
    log.touch()
    paths = {"LD_LIBRARY_PATH": str(driver), "TRITON_LIBCUDA_PATH": str(driver)} if driver else {}
    known = {"PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent))), "FAKE_DRIVER_LOG": str(log)}
    command = [sys.executable, str(HERE / "ahead_process.py"), name, str(folder), way]
    done = subprocess.run(command, env=os.environ | known | paths | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, log.read_text().splitlines()


def without_addresses(lines):
    """Log lines with all addresses numbered in the order in which they occur, because processes differ in them."""
    numbers: dict = {}

    def number(match):
        value = int.from_bytes(bytes.fromhex(match[0]), "little")
        return f"<{numbers.setdefault(value, len(numbers))}>" if 1 << 32 <= value < 1 << 47 else match[0]

    return [re.sub(r"(?<![0-9a-z])[0-9a-f]{16}|(?<=[0-9a-f]{16})[0-9a-f]{16}", number, line) for line in lines]


@pytest.mark.parametrize("name", CALLS)
def test_a_folder_launches_what_triton_launches(name, driver, tmp_path):
    folder = tmp_path / "kernels"
    run(name, folder, "save")
    _, expected = run(name, folder, "triton", driver)
    nothing = {"CC": "false", "TRITON_CACHE_DIR": str(tmp_path / "empty"), "FLEXDECODE_CACHE_DIR": str(tmp_path / "no")}
    _, actual = run(name, folder, "folder", driver, **nothing)
    assert sum("decode_" in line for line in actual) >= 2
    assert without_addresses(actual) == without_addresses(expected)
    assert not (tmp_path / "empty").exists() and not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", CALLS)
def test_the_store_launches_what_triton_launches(name, driver, tmp_path):
    """Both where the kernels are compiled, and in another process that finds them."""
    folder = tmp_path / "kernels"
    run(name, folder, "save")
    _, expected = run(name, folder, "triton", driver)
    store = {"FLEXDECODE_CACHE_DIR": str(tmp_path / "store"), "TRITON_CACHE_DIR": str(tmp_path / "empty")}
    _, compiled = run(name, folder, "compile", driver, **store)
    _, found = run(name, folder, "disk", driver, **store, CC="false")
    assert sum("decode_" in line for line in expected) >= 2
    assert without_addresses(compiled) == without_addresses(found) == without_addresses(expected)


def test_a_call_is_quick_whose_kernels_are_on_disk(driver, tmp_path):
    """Below 50 ms; the fastest of several processes counts, because the machine may be busy."""
    folder = tmp_path / "kernels"
    run("mods", folder, "save")
    variables = {"FLEXDECODE_CACHE_DIR": str(tmp_path / "store"), "TRITON_CACHE_DIR": str(tmp_path / "empty")}
    run("mods", folder, "compile", driver, **variables)
    variables |= {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    milliseconds = [float(run("mods", folder, "disk", driver, **variables)[0]) for _ in range(4)]
    assert min(milliseconds) < 50, milliseconds


def test_without_a_c_compiler_triton_launches(driver, tmp_path):
    folder = tmp_path / "kernels"
    run("mods", folder, "save")
    _, expected = run("mods", folder, "triton", driver)  # from now on Triton has its launchers
    _, found = run("mods", folder, "compile", driver, CC="false", FLEXDECODE_CACHE_DIR=str(tmp_path / "store"))
    assert without_addresses(found) == without_addresses(expected)


def test_loading_and_the_first_call_are_quick(driver, tmp_path):
    """Below 100 ms; the fastest of several processes counts, because the machine may be busy."""
    folder = tmp_path / "kernels"
    run("mods", folder, "save")
    variables = {"PYTHONPYCACHEPREFIX": str(tmp_path / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    milliseconds = [float(run("mods", folder, "folder", driver, **variables)[0]) for _ in range(4)]
    assert min(milliseconds) < 100, milliseconds


PACKING = """
import ctypes, sys
from pathlib import Path
from flexdecode.ahead.helper import build_launcher, import_launcher

backend = sys.argv[1]
path = Path(sys.argv[2]) / "launcher.abi3.so"
path.write_bytes(build_launcher())
launcher = import_launcher(path, "checksum")
sizes = [8, 8, 1, 4, 8, 2, 4, 128, 8, 8]
tell = ctypes.CDLL({"cuda": "libcuda.so.1", "hip": "libamdhip64.so"}[backend]).fake_tell_sizes
tell(len(sizes), (ctypes.c_int * len(sizes))(*sizes))
kernel = launcher.load(backend, "some_kernel", b"\\x7fELF", "P(l(bx))()xfdhiT", 0, 64, 100, 1)
good = [None, (-1, (True, "skipped")), (), object(), 1.5, 2, -2, 1 << 31, bytes(range(128))]
launcher.launch(kernel, 3, 4, 5, good)
launcher.launch(kernel, 0, 4, 5, good)  # nothing to do
launcher.launch(kernel, 3, 4, 5, tuple([1 << 63, *good[1:]]))


def refused(*arguments):
    try:
        launcher.launch(kernel, 3, 4, 5, *arguments)
    except Exception as error:
        print(f"{type(error).__name__}: {error}")


refused(good[:-1])
refused([*good, 1])
refused([*good[:7], 1 << 32, good[8]])
refused([*good[:8], b"short"])
refused([*good[:4], "text", *good[5:]])
refused([good[0], 7, *good[2:]])
refused(7)
try:
    launcher.load(backend, "some_kernel", b"damaged", "P", 0, 64, 100, 1)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_the_helper_packs_arguments(backend, driver, tmp_path):
    log = tmp_path / "log"
    known = {"LD_LIBRARY_PATH": str(driver), "PYTHONPATH": str(HERE.parents[1]), "FAKE_DRIVER_LOG": str(log)}
    command = [sys.executable, "-c", PACKING, backend, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | known, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = log.read_text().splitlines()
    head, params = first.split(" params ")
    attributes = " attributes 6=1" if backend == "cuda" else ""
    assert head == f"some_kernel grid 3 4 1 block 64 1 1 shared 100 stream 0x5{attributes}"
    assert params.split() == [
        "00" * 8, "ff" * 8, "01", "0000c03f", "0000000000000040", "feff", "00000080", bytes(range(128)).hex(), "00" * 8,
        "00" * 8,
    ]  # fmt: skip
    assert second.split(" params ")[1].split()[0] == "00" * 7 + "80"
    name = backend.upper()
    assert done.stdout.splitlines() == [
        "TypeError: the number of arguments is not that of the kernel",
        "TypeError: the number of arguments is not that of the kernel",
        "OverflowError: 4294967296 does not fit into 32 bits",
        "TypeError: a descriptor must be what encode() made",
        "TypeError: must be real number, not str",
        "TypeError: arguments must be a tuple",
        "TypeError: arguments must be a tuple",
        f"{name} error 200 while loading some_kernel: made up",
    ]


# --- Writing ----------------------------------------------------------------------------------------------------------


def save(folder, *, device="H200", D=128, **keywords):
    return flexdecode.save_kernels(folder, *meta_inputs(2, 8, 2, 1, 4096, D), device=device, **keywords)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with one call, and what `save_kernels` said."""
    folder = tmp_path_factory.mktemp("written") / "kernels"
    return folder, save(folder)


@pytest.fixture
def folder(written, tmp_path, monkeypatch):
    """A copy of it. What a test loads is forgotten."""
    monkeypatch.setattr(loaded, "_loaded", {})
    return shutil.copytree(written[0], tmp_path / "kernels")


def test_what_is_written(written):
    _, kernels = written
    assert [kernel.kernel for kernel in kernels] == ["decode_split", "decode_combine"]
    for kernel in kernels:
        assert kernel.signature.startswith(f"{kernel.kernel} for sm_90, query float16, cache float16, D 128")
        binary, source = kernel.files
        assert binary.read_bytes()[:4] == b"\x7fELF" and f"def {kernel.kernel}(" in source.read_text()
        assert kernel.num_bytes == binary.stat().st_size and not kernel.was_there


def test_the_same_call_again_compiles_nothing(folder):
    with mock.patch.object(writer, "compile_pass", side_effect=AssertionError), flexdecode.forbid_compilation():
        assert all(kernel.was_there for kernel in save(folder))


def test_a_folder_takes_more_calls(folder):
    more = save(folder, D=64, score_mod=flexdecode.mods.softcap(30.0), return_lse=True)
    assert not any(kernel.was_there for kernel in more)
    assert flexdecode.load(folder).num_kernels == 4


def test_the_mods_are_found_by_their_graphs(folder):
    """Other functions and other numbers with the same graph; another graph is another kernel."""

    def capped(cap):
        return lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap)

    first = save(folder, score_mod=capped(30.0))
    with mock.patch.object(writer, "compile_pass", side_effect=AssertionError):
        assert all(kernel.was_there for kernel in save(folder, score_mod=capped(20.0)))
    other = save(folder, score_mod=lambda score, b, h, q_idx, kv_idx: 2 * score)
    assert first[0].files[0] != other[0].files[0] and not other[0].was_there


@pytest.mark.parametrize("name", DEVICES)
def test_every_architecture(name, tmp_path, monkeypatch):
    monkeypatch.setattr(loaded, "_loaded", {})
    kernels = save(tmp_path / "kernels", device=DEVICES[name])
    assert all(name in kernel.signature and kernel.num_bytes for kernel in kernels)
    found = flexdecode.load(tmp_path / "kernels")
    assert (found.num_kernels, found.device) == (2, name)
    assert repr(found).startswith(
        f"<2 kernels for {name} in {found.folder} (flexdecode {flexdecode.__version__}, Triton"
    )


def test_a_kernel_that_does_not_compile_is_remembered(tmp_path, monkeypatch):
    """Then a kernel with smaller tiles takes its place, and where the folder is loaded there is no other attempt."""
    monkeypatch.setattr(loaded, "_loaded", {})

    def refuse(module, spec, facts, combine):
        if not combine and spec.tiles.block_n > 32:
            raise SharedMemoryError("too large")
        return compile_pass(module, spec, facts, combine)

    with mock.patch.object(writer, "compile_pass", refuse):
        kernels = save(tmp_path)
    assert [bool(kernel.files) for kernel in kernels] == [False, False, True, True] and kernels[0].num_bytes == 0
    assert "and 64 keys" in kernels[1].signature and "and 32 keys" in kernels[2].signature
    assert flexdecode.load(tmp_path).num_kernels == 2
    with mock.patch.object(writer, "compile_pass", side_effect=AssertionError):
        assert all(kernel.was_there for kernel in save(tmp_path))


# --- What is refused --------------------------------------------------------------------------------------------------


def test_another_architecture_in_the_same_folder(folder):
    with pytest.raises(KernelFolderError, match=r"was compiled for sm_90, this GPU is sm_80: write kernels for each"):
        save(folder, device=DEVICES["sm_80"])


def test_an_unknown_device(tmp_path):
    with pytest.raises(ValueError, match=r"`device` must be .*\"H200\".* got 'H900'"):
        save(tmp_path / "kernels", device="H900")
    with pytest.raises(ValueError, match="`query` is on the meta device: say for which GPU"):
        save(tmp_path / "kernels", device=None)
    assert not (tmp_path / "kernels").exists()


@pytest.mark.parametrize(
    ("backend", "arch"), [("cuda", 77), ("cuda", "sm_90"), ("hip", "gfx000"), ("hip", 90), ("tpu", 5), ("cpu", "x")]
)
def test_an_unknown_architecture(backend, arch, tmp_path):
    """Some of these would end the process."""
    with pytest.raises(
        ValueError, match=rf"^there is no architecture {backend} {arch!r}: known are cuda 75, .*gfx950$"
    ):
        save(tmp_path / "kernels", device=DeviceFacts(backend, arch, 100, 100000))
    assert not (tmp_path / "kernels").exists()


def test_the_torch_backend_and_the_interpreter(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r'`options.backend="torch"` compiles nothing'):
        save(tmp_path, options=DecodeOptions(backend="torch"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 replaces Triton's compiler"):
        save(tmp_path)


def test_wrong_arguments_name_the_function(tmp_path):
    with pytest.raises(TypeError, match=r"save_kernels\(\) got an unexpected keyword argument 'windw'"):
        save(tmp_path, windw=3)
    with pytest.raises(TypeError, match=r"warmup\(\) missing a required argument: 'query'"):
        flexdecode.warmup(scale=3)


def test_nothing_is_written_while_compilation_is_forbidden(folder, tmp_path):
    with flexdecode.forbid_compilation():
        with pytest.raises(
            CompilationForbiddenError, match=r"decode_split would have .*\n.*D 64.*\n.*allow_compilation"
        ):
            save(folder, D=64)
        with pytest.raises(CompilationForbiddenError, match="the launcher of a folder of kernels"):
            save(tmp_path / "new")


def test_parameters_of_another_size_are_refused(tmp_path, monkeypatch):
    """A Triton that passes arguments in another way is refused when the folder is written."""
    monkeypatch.setattr(entries, "parameter_bytes", lambda asm: [8, 8, 4])
    with pytest.raises(CompileError, match=r"gives decode_split parameters of \[8, 8, 4\] bytes"):
        save(tmp_path)


@pytest.mark.parametrize("facts", [DEVICES["sm_80"], DEVICES["gfx942"]], ids=["sm_80", "gfx942"])
def test_loading_on_another_architecture(folder, facts):
    ours = "sm_80" if facts.backend == "cuda" else "gfx942"
    with (
        mock.patch("flexdecode.runtime.ahead._present_facts", lambda: facts),
        pytest.raises(KernelFolderError, match=f"was compiled for sm_90, this GPU is {ours}: compile it again"),
    ):
        flexdecode.load(folder)
    assert not loaded.any_folder()


def test_loading_with_another_triton(folder):
    with (
        mock.patch("flexdecode.codegen.identity.triton_release", lambda: "9.9.9"),
        pytest.raises(KernelFolderError, match=r"was written with Triton .*, this is Triton 9\.9\.9: write it again"),
    ):
        flexdecode.load(folder)


def test_loading_a_damaged_folder(folder):
    binary = next((folder / "kernels").iterdir())
    binary.write_bytes(binary.read_bytes()[:-1])
    with pytest.raises(KernelFolderError, match=rf"is damaged, kernels/{binary.name} has another checksum: delete it"):
        flexdecode.load(folder)
    assert not loaded.any_folder()


# --- Calls that find nothing ------------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    """Calls are prepared for an H200; nothing can be launched."""
    flexdecode.clear_cache()
    with (
        mock.patch.object(prepare, "device_facts", lambda device: DEVICES["sm_90"]),
        mock.patch("flexdecode.runtime.ahead.device_facts", lambda device: DEVICES["sm_90"]),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
    ):
        yield
    flexdecode.clear_cache()


def test_a_call_that_misses_names_its_signature(folder, gpu):
    flexdecode.load(folder)
    tensors = meta_inputs(2, 8, 2, 1, 4096, 64)
    with flexdecode.forbid_compilation(), pytest.raises(CompilationForbiddenError) as caught:
        flexdecode.warmup(*tensors, options=DecodeOptions(backend="triton"))
    first, second, third = str(caught.value).splitlines()
    assert first.startswith("decode_split would have to be compiled, and compilation is forbidden")
    assert second.startswith("  signature: decode_split for sm_90, query float16, cache float16, D 64, Dv 64, 4 query")
    assert "flexdecode.save_kernels" in third and "flexdecode.warmup" in third


def test_latents_that_miss_do_not_count_as_a_kernel_that_does_not_compile(gpu, monkeypatch):
    monkeypatch.setattr(prepare, "_refusals", {})
    key = torch.empty(4, 1, 8192, 576, dtype=torch.bfloat16, device="meta")
    query = torch.empty(4, 128, 1, 576, dtype=torch.bfloat16, device="meta")
    with flexdecode.forbid_compilation(), pytest.raises(CompilationForbiddenError, match="decode_split"):
        flexdecode.warmup(query, key, key[..., :512], options=DecodeOptions(backend="triton"))
    assert prepare.allows_latents(DEVICES["sm_90"])


def test_kernels_of_other_functions_are_refused_too():
    """`append` and `merge_attention` have kernels that Triton compiles when they are called."""
    kernel = triton_api.standalone_kernel.__wrapped__(template_folder() / "merge.py", "merge_parts")
    with (
        flexdecode.forbid_compilation(),
        pytest.raises(CompilationForbiddenError, match=r"kernel merge_parts of merge\.py .*\n.*Call it once before"),
    ):
        kernel._do_compile()
