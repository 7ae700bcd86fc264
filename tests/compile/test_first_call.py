"""What the machine code in the store depends on besides the kernel; and the benchmark of the first call."""

import json

import pytest
import torch
import triton
from compile.compiling import DEVICES, compile_call, meta_inputs
from triton._C.libtriton import llvm
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from benchmarks import first_call
from flexdecode import mods, triton_api
from flexdecode.codegen.compile import compile_pass
from flexdecode.triton_api import compiler_text, load_module

TARGET = "cuda", 90, 32


def test_the_settings_of_triton_are_part_of_the_identity(monkeypatch):
    plain = compiler_text(TARGET)
    assert plain == compiler_text(TARGET) and triton.__version__ in plain
    assert compiler_text(("cuda", 100, 32)) != plain
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert compiler_text(TARGET) == plain
    for name in ("TRITON_PTXAS_PATH", "DISABLE_LLVM_OPT", "TRITON_DISABLE_LINE_INFO"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "1")
            assert compiler_text(TARGET) != plain


@pytest.mark.parametrize("name", ["always_compile", "override", "dump_ir"])
def test_where_triton_is_asked_to_do_more_nothing_is_kept(name):
    with triton.knobs.compilation.scope():
        setattr(triton.knobs.compilation, name, True)
        assert compiler_text(TARGET) is None
    assert compiler_text(TARGET) is not None


def test_a_setting_in_the_program_is_part_of_the_identity():
    plain = compiler_text(TARGET)
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        assert compiler_text(TARGET) != plain


def test_triton_hashes_its_files_for_other_kernels_only(monkeypatch):
    from triton.runtime import cache

    hashed = []
    monkeypatch.setattr(cache, "triton_key", lambda: hashed.append(1) or "the hash")
    triton_api._identify_quickly.cache_clear()
    compile_call("sm_90", meta_inputs(2, 8, 2, 1, 4096, 32), mods.softcap(7.0))
    assert not hashed
    assert cache.triton_key() == "the hash" and hashed == [1]
    triton_api._identify_quickly.cache_clear()


def test_triton_reads_the_functions_of_a_kernel_once(monkeypatch):
    """To find a kernel in its own store, Triton would walk over all of them."""
    read = []
    parse = JITFunction.parse
    monkeypatch.setattr(JITFunction, "parse", lambda self: read.append(self.__name__) or parse(self))
    compile_call("sm_90", meta_inputs(2, 8, 2, 1, 4096, 48), mods.softcap(7.0))
    assert read.count("decode_split") == read.count("decode_combine") == 1


def test_the_text_of_a_module_identifies_its_functions(tmp_path):
    """Also its records, which are no functions."""
    call = compile_call("sm_90", meta_inputs(2, 8, 2, 1, 4096, 48))
    edited = tmp_path / "edited.py"
    text = call.path.read_text()
    assert "full_start full_end" in text
    edited.write_text(text.replace("full_start full_end", "full_end full_start"))
    modules = [load_module(path) for path in (call.path, call.path, edited)]
    first, again, other = (compile_pass(x, call.spec, DEVICES["sm_90"], combine=False).hash for x in modules)
    assert first == again != other
    functions = [x for x in vars(modules[0]).values() if isinstance(x, JITFunction)]
    assert len({x.cache_key for x in functions}) == len(functions) > 50


def test_a_kernel_is_said_to_be_read_before_it_is_compiled(monkeypatch):
    happened = []
    make_ttir = CUDABackend.__dict__["make_ttir"].__func__
    monkeypatch.setattr(CUDABackend, "make_ttir", staticmethod(lambda *a: happened.append("TTIR") or make_ttir(*a)))
    call = compile_call("sm_90", meta_inputs(2, 8, 2, 1, 4096, 48))
    happened.clear()
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        compile_pass(load_module(call.path), call.spec, DEVICES["sm_90"], combine=False, when_read=happened.append)
    seconds, *others = happened
    assert 0 < seconds < 60 and others == ["TTIR"]


def test_llvm_reads_no_library_for_a_first_pass(monkeypatch):
    linked = []
    link = llvm.link_extern_libs
    monkeypatch.setattr(llvm, "link_extern_libs", lambda *arguments: linked.append(1) or link(*arguments))
    call = compile_call("sm_90", meta_inputs(2, 8, 2, 1, 4096, 48))
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        split = compile_pass(load_module(call.path), call.spec, DEVICES["sm_90"], combine=False)
    assert call.combine is not None and not linked and "ex2.approx.ftz.f32" in split.asm["ptx"]


def test_an_edited_triton_is_another_one(monkeypatch, tmp_path):
    known = []
    for text in ("x = 1", "x = 12"):
        (tmp_path / "language").mkdir(exist_ok=True)
        (tmp_path / "language" / "core.py").write_text(text)
        triton_api._installed.cache_clear()
        monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
        known.append(triton_api._installed())
    triton_api._installed.cache_clear()
    assert known[0] != known[1]


def test_the_benchmark_compiles_once_and_then_finds(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(first_call, "CASES", ("four captures and a mask",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert first_call.main(["--out", str(tmp_path), "--commit", "abc", "--repeats", "1"]) == 0
    document = json.loads((tmp_path / "first_call.json").read_text())
    assert document["environment"]["commit"] == "abc" and document["until"] == "the load (no GPU)"
    times = {record["way"]: record["times_ms"] for record in document["results"]}
    assert list(times) == ["cold", "disk", "second"] and all(len(of) == 1 for of in times.values())
    assert 0 < times["disk"][0] < times["second"][0]
    printed = capsys.readouterr().out
    assert "first call, up to the load (no GPU)" in printed and "four captures and a mask, cold" in printed


def test_a_process_that_finds_nothing_is_not_counted(monkeypatch):
    found = {"first": 1.0, "second": 1.0, "compilations": 2, "disk_hits": 0, "generations": 2}
    monkeypatch.setattr(first_call, "start", lambda case, folder: found)
    with pytest.raises(SystemExit, match="plain: not what was to be measured"):
        first_call.measure("plain")


def test_the_table_shows_the_goals():
    results = [{"case": "plain", "way": "cold", "times_ms": [700.0, 800.0, 1500.0]}]
    document = {"results": results, "until": "the result", "limits_ms": {"cold": 900.0}}
    document["environment"] = {"hardware": "H100"}
    lines = first_call.table(document).splitlines()
    assert lines[1].split() == ["plain,", "cold", "800", "700", "1500", "900"] and lines[-1] == "H100"
