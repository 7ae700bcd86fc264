"""A damaged artefact is made again; text that does not compile is an error that names its file."""

import json
import os
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
from compile import compiling
from compile.compiling import DEVICES, compile_call, meta_inputs

from flexdecode import CompileError, FlexDecodeError, cache_info, clear_cache, triton_api
from flexdecode.codegen.compile import compile_pass
from flexdecode.triton_api import load_module

SHAPE = (2, 8, 2, 1, 512, 64)


@pytest.fixture
def fresh_caches(monkeypatch, tmp_path):
    """Empty caches on disk and in memory; gives the folder of Triton's."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", str(tmp_path / "flexdecode"))
    monkeypatch.setattr(compiling, "_compiled", {})
    clear_cache()
    yield tmp_path / "triton"
    clear_cache()


def damage_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_whole(path):
    path.write_bytes(b"")


# A kernel that Triton 3.9 fails to load from its cache also fails in its own destructor.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", [damage_half, damage_whole])
@pytest.mark.parametrize("pattern", ["*/decode_split.json", "*/__grp__*.json"])
def test_a_damaged_entry_of_tritons_cache_is_compiled_again(pattern, damage, fresh_caches):
    first = compile_call("sm_90", meta_inputs(*SHAPE))
    files = list(fresh_caches.glob(pattern))
    assert files, sorted(fresh_caches.glob("*/*"))
    for file in files:
        damage(file)
    compiling._compiled.clear()
    again = compile_call("sm_90", meta_inputs(*SHAPE))
    assert again.split.asm["ptx"] == first.split.asm["ptx"]
    assert all(json.loads(file.read_text()) for file in files)


@pytest.mark.parametrize("damage", [damage_half, damage_whole, Path.unlink])
@pytest.mark.parametrize("pattern", ["modules/*.py", "index/*"])
def test_a_damaged_module_is_generated_again(pattern, damage, fresh_caches):
    path = compile_call("sm_90", meta_inputs(*SHAPE)).path
    text = path.read_text()
    for file in (fresh_caches.parent / "flexdecode").glob(pattern):
        damage(file)
    assert compile_call("sm_90", meta_inputs(*SHAPE)).path.read_text() == text
    assert cache_info().generations == 2


def test_a_known_module_is_found_on_disk(fresh_caches):
    compile_call("sm_90", meta_inputs(*SHAPE))
    clear_cache()
    compile_call("sm_90", meta_inputs(*SHAPE))
    assert (cache_info().generations, cache_info().disk_hits) == (0, 1)


def test_a_folder_that_cannot_be_written_is_no_error(fresh_caches, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", str(tmp_path / "file"))
    assert compile_call("sm_90", meta_inputs(*SHAPE)).path.exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("exp2((state.m_i - m_safe) * LOG2E, C)", "exp2((state.m_i - no_such_name) * LOG2E, C)"),
        ("exp2((state.m_i - m_safe) * LOG2E, C)", "tl.no_such_function(state.m_i)"),
        ("exp2((state.m_i - m_safe) * LOG2E, C)", "tl.dot(state.m_i, state.m_i)"),
    ],
)
def test_text_that_does_not_compile_names_its_file(old, new, fresh_caches, tmp_path):
    call = compile_call("sm_90", meta_inputs(*SHAPE))
    text = call.path.read_text()
    assert old in text
    path = tmp_path / "broken.py"
    path.write_text(text.replace(old, new))
    with pytest.raises(CompileError, match="decode_split did not compile") as caught:
        compile_pass(load_module(path), call.spec, DEVICES["sm_90"], combine=False)
    assert f"source: {path}" in str(caught.value)
    assert isinstance(caught.value, FlexDecodeError)


def test_a_compiler_that_is_killed_is_an_error(fresh_caches):
    """Also errors that look like a damaged cache entry are raised in the end."""
    with (
        mock.patch("triton.compile", side_effect=OSError("ptxas was killed")),
        pytest.raises(CompileError, match=r"ptxas was killed[^$]*source: .*\.py"),
    ):
        compile_call("sm_90", meta_inputs(*SHAPE))


def test_threads_that_find_damaged_entries_leave_tritons_cache_in_use():
    """Both passes may be compiled at once. The thread that begins again first ends first."""
    from triton import knobs

    both_found, begun = threading.Barrier(2, timeout=10), threading.Event()
    found = set()

    def compile_something(source, target, options):
        if source not in found:
            found.add(source)
            both_found.wait()
            if source == "second":
                begun.wait(10)
            raise ValueError("a damaged entry")
        assert knobs.cache.manager_class is not None
        begun.set()
        time.sleep(0.1 if source == "first" else 0.3)

    threads = [threading.Thread(target=triton_api._compile, args=(name, None, {})) for name in ("first", "second")]
    with knobs.cache.scope(), mock.patch("triton.compile", compile_something):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert knobs.cache.manager_class is None


def test_nothing_is_written_outside_the_caches(fresh_caches):
    before = set(os.listdir())
    compile_call("sm_90", meta_inputs(*SHAPE))
    assert set(os.listdir()) == before
    assert set(os.listdir(fresh_caches.parent)) == {"triton", "flexdecode"}
