"""Folders of kernels on disk: what is written is read again, and everything else is refused in one line."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading

import pytest

from flexdecode.ahead import helper
from flexdecode.ahead.folder import (
    LAUNCHER,
    MANIFEST,
    Entry,
    MadeWith,
    add_to_folder,
    check_files,
    check_target,
    read_folder,
)
from flexdecode.ahead.helper import build_launcher, import_launcher
from flexdecode.errors import CompileError, FlexDecodeError, KernelFolderError, SharedMemoryError

HERE = MadeWith("0.1.0", "abc", "3.6.0", "Linux x86_64", "cuda", 90)
ENTRY = Entry("decode_split", "some signature", None, "kernels/a.cubin", "sources/a.py", "Px(il)", 128, 512, True)
FILES = {"kernels/a.cubin": b"\x7fELF", "sources/a.py": b"x = 1\n", LAUNCHER: b"helper"}


@pytest.fixture
def folder(tmp_path):
    add_to_folder(tmp_path / "kernels", HERE, {"id": ENTRY}, FILES)
    return tmp_path / "kernels"


def refusal(folder, here=HERE):
    """The message with which a folder is refused; the class and the one line are checked."""
    with pytest.raises(KernelFolderError) as caught:
        check_files(read_folder(folder, here))
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read_again(folder):
    found = read_folder(folder, HERE)
    check_files(found)
    assert found.entries == {"id": ENTRY} and found.made_with == HERE
    assert {name: found.read(name) for name in found.checksums} == FILES


def test_a_folder_keeps_what_it_has(folder):
    other = Entry("decode_combine", "other", binary="kernels/b.cubin", source="sources/a.py")
    add_to_folder(folder, HERE, {"other": other}, {"kernels/b.cubin": b"\x7fELF2"})
    found = read_folder(folder, HERE)
    check_files(found)
    assert found.entries == {"id": ENTRY, "other": other} and len(found.checksums) == 4


def test_many_writers_lose_nothing(tmp_path):
    path = tmp_path / "kernels"

    def write(i):
        add_to_folder(path, HERE, {str(i): ENTRY}, {**FILES, f"kernels/k{i}.cubin": bytes([i])})

    threads = [threading.Thread(target=write, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = read_folder(path, HERE)
    check_files(found)
    assert set(found.entries) == set(map(str, range(8)))
    assert not [name for _, _, names in os.walk(path) for name in names if name.startswith(".new")]


def test_a_refused_kernel_is_refused_again():
    for error in (SharedMemoryError("too large"), CompileError("no such layout")):
        entry = Entry("decode_split", "", (type(error).__name__, str(error)))
        with pytest.raises(type(error), match=str(error)):
            entry.check()
    ENTRY.check()


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("flexdecode", "0.2.0", "was written with flexdecode 0.1.0, this is flexdecode 0.2.0: write it again"),
        ("triton", "3.9.0", "was written with Triton 3.6.0, this is Triton 3.9.0: write it again"),
        ("system", "Linux aarch64", "was written with Linux x86_64, this is Linux aarch64: write it again"),
        ("sources", "def", "was written by flexdecode 0.1.0 with other source files: write it again"),
    ],
)
def test_other_versions_are_refused_by_name(folder, name, value, message):
    assert message in refusal(folder, HERE._replace(**{name: value}))
    with pytest.raises(KernelFolderError, match=re.escape(message)):
        add_to_folder(folder, HERE._replace(**{name: value}), {}, {})


def test_a_version_with_another_layout_is_refused_by_its_version(folder):
    manifest = {"format": 7, "made_with": {"flexdecode": "9.9", "something": 1}, "kernels": []}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert "was written with flexdecode 9.9, this is flexdecode 0.1.0" in refusal(folder)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        (("cuda", 80), ("cuda", 90), "was compiled for sm_80, this GPU is sm_90: compile it again"),
        (("cuda", 90), ("hip", "gfx942"), "was compiled for sm_90, this GPU is gfx942: compile it again"),
    ],
)
def test_other_architectures_are_refused_by_name(tmp_path, theirs, ours, message):
    made, here = (HERE._replace(backend=backend, arch=arch) for backend, arch in (theirs, ours))
    with pytest.raises(KernelFolderError, match=message):
        check_target(tmp_path, made, here, "compile it again")
    check_target(tmp_path, made, made, "")


def test_no_folder(tmp_path):
    assert "there is no folder" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert f"it has no {MANIFEST}" in refusal(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"made_with": 3}', "\0", "[" * 100000])
def test_a_manifest_that_is_none(folder, text):
    (folder / MANIFEST).write_text(text)
    assert f"{MANIFEST} is no manifest" in refusal(folder) and "damaged" in refusal(folder)


@pytest.mark.parametrize("change", ["entries", "checksums", "format"])
def test_a_changed_manifest(folder, change):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[change] = 2 if change == "format" else {}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert f"{MANIFEST} has another checksum" in refusal(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_changed_or_missing_file(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-1])
    assert f"{name} has another checksum: delete it and write it again" in refusal(folder).replace("damaged, ", "")
    (folder / name).unlink()
    assert f"{name} cannot be read: No such file" in refusal(folder)


@pytest.mark.parametrize("name", ["../escape.py", "/etc/passwd", "kernels/../../x", "kernels/.hidden", ""])
def test_files_outside_of_the_folder(tmp_path, name):
    from flexdecode.ahead import folder as module

    path = tmp_path / "kernels"
    path.mkdir()
    manifest = {"format": 1, "made_with": HERE._asdict(), "entries": {}, "checksums": {name: "0"}}
    manifest["checksum"] = module._checksum(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))
    assert "names files outside of it" in refusal(path)


@pytest.mark.parametrize("place", ["", "kernels", "sources", "kernels/a.cubin", LAUNCHER])
def test_a_place_that_everybody_can_write_to(folder, place):
    (folder / place).chmod(0o777)
    with pytest.raises(PermissionError, match=r"everybody can write to .*chmod o-w"):
        check_files(read_folder(folder, HERE))


def test_what_is_written_is_not_open_to_everybody(tmp_path):
    before = os.umask(0)
    try:
        add_to_folder(tmp_path / "kernels", HERE, {"id": ENTRY}, FILES)
    finally:
        os.umask(before)
    check_files(read_folder(tmp_path / "kernels", HERE))
    assert (tmp_path / "kernels" / LAUNCHER).stat().st_mode & 0o777 == 0o644  # others may read it


# --- The C helper -----------------------------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    path = tmp_path_factory.mktemp("launcher") / LAUNCHER
    path.write_bytes(build_launcher())
    return path


@needs_compiler
def test_the_helper_links_no_driver_and_loads_without_one(launcher):
    shown = subprocess.run(["ldd", launcher], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in shown and "libpython" not in shown
    module = import_launcher(launcher, "checksum")
    assert import_launcher(launcher, "checksum") is module


@needs_compiler
def test_without_a_driver_the_helper_says_so(launcher):
    """In a process of its own, because a machine with a GPU has the driver."""
    code = f"""
import sys; sys.path.insert(0, {str(launcher.parents[0])!r})
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
loader = ExtensionFileLoader("flexdecode_launcher", {str(launcher)!r})
module = module_from_spec(spec_from_loader("flexdecode_launcher", loader))
loader.exec_module(module)
try:
    module.load("hip", "decode_split", b"image", "P", 0, 64, 0, 0)
except RuntimeError as error:
    print(error)
try:
    module.launch("no kernel", 1, 1, 0, ())
except ValueError as error:
    print("refused")
try:
    module.launch()
except TypeError as error:
    print(error)
"""
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "libamdhip64.so cannot be opened: is there a GPU driver?" in shown
    assert "refused" in shown and "launch takes 5 arguments, got 0" in shown


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match="needs a C compiler: install gcc, or name one by the variable CC"):
        build_launcher()


@pytest.mark.parametrize(("compiler", "message"), [("false", "did not compile"), ("/nothing/cc", "cannot be started")])
def test_a_compiler_that_fails(monkeypatch, compiler, message):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(CompileError, match=message):
        build_launcher()


def test_a_helper_of_another_system(tmp_path):
    path = tmp_path / LAUNCHER
    path.write_bytes(b"no shared object")
    with pytest.raises(KernelFolderError, match="does not work on this system"):
        import_launcher(path, "another checksum")
    assert "another checksum" not in helper._imported


def test_the_errors_are_those_of_the_library():
    assert issubclass(KernelFolderError, FlexDecodeError)
