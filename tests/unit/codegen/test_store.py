"""The store on disk, the bounded dict, and what importing the package costs."""

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import flexdecode
from flexdecode import cache_info, clear_cache
from flexdecode.codegen import store
from flexdecode.codegen.store import store_folder, stored_module
from flexdecode.memos import Bounded, CacheInfo

ROOT = Path(flexdecode.__file__).parents[1]


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", str(tmp_path / "cache"))
    clear_cache()
    yield tmp_path / "cache"
    clear_cache()


class Generator:
    """Gives a text and counts how often it was asked for one."""

    def __init__(self, text="x = 1\n"):
        self.text = text
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.text


def files(folder, kind):
    return sorted((folder / kind).iterdir())


# --- Modules on disk --------------------------------------------------------------------------------------------------


def test_a_module_is_generated_once(folder):
    generate = Generator("x = 'ü'\n")
    path = stored_module("an identity", generate)
    assert path.read_text(encoding="utf-8") == generate.text and path.suffix == ".py"
    assert stored_module("an identity", generate) == path
    assert generate.calls == 1
    info = cache_info()
    assert (info.generations, info.disk_hits) == (1, 1)


def test_the_disk_survives_a_restart(folder):
    """`clear_cache` forgets the memory only, as a new process does."""
    path = stored_module("an identity", Generator())
    clear_cache()
    generate = Generator()
    assert stored_module("an identity", generate) == path
    assert (generate.calls, cache_info().generations, cache_info().disk_hits) == (0, 0, 1)


def test_equal_texts_share_a_file(folder):
    one, other = stored_module("one", Generator()), stored_module("other", Generator())
    assert one == other
    assert len(files(folder, "modules")) == 1 and len(files(folder, "index")) == 2
    assert stored_module("third", Generator("y = 2\n")) != one


def test_another_version_of_the_library_generates_anew(folder, monkeypatch):
    stored_module("an identity", Generator())
    monkeypatch.setattr(store, "__version__", "0.0.other")
    generate = Generator("y = 2\n")
    stored_module("an identity", generate)
    assert generate.calls == 1


@pytest.mark.parametrize("damage", [b"", b"x = ", b"\xff\xfe\x00", b"x = 1\n# more\n"])
@pytest.mark.parametrize("kind", ["modules", "index"])
def test_a_damaged_file_is_written_again(folder, damage, kind):
    generate = Generator()
    path = stored_module("an identity", generate)
    (file,) = files(folder, kind)
    file.write_bytes(damage)
    assert stored_module("an identity", generate) == path
    assert path.read_text() == generate.text
    assert generate.calls == 2
    assert stored_module("an identity", generate) == path and generate.calls == 2


@pytest.mark.parametrize("kind", ["modules", "index"])
def test_a_missing_file_is_written_again(folder, kind):
    generate = Generator()
    path = stored_module("an identity", generate)
    (file,) = files(folder, kind)
    file.unlink()
    assert stored_module("an identity", generate) == path and path.read_text() == generate.text


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a\0b", "x" * 5000])
def test_an_index_that_points_elsewhere_is_not_followed(folder, name):
    generate = Generator()
    path = stored_module("an identity", generate)
    (file,) = files(folder, "index")
    file.write_text(name)
    assert stored_module("an identity", generate) == path and generate.calls == 2


def test_no_temporary_files_stay(folder):
    stored_module("an identity", Generator())
    assert len(files(folder, "modules")) == len(files(folder, "index")) == 1


def test_a_failed_generation_leaves_nothing(folder):
    def fail():
        raise RuntimeError("no text")

    with pytest.raises(RuntimeError, match="no text"):
        stored_module("an identity", fail)
    assert not folder.exists()
    assert cache_info().generations == 0


def unwritable(folder):
    """A path below a file: nothing can be made there, not even by root."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file")
    return folder / "cache"


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", str(unwritable(tmp_path / "taken")))
    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    generate = Generator()
    path = stored_module("an identity", generate)
    assert path.read_text() == generate.text
    assert path.is_relative_to(tmp_path / "temporary")


def test_a_writing_error_does_not_leave_a_temporary_file(folder, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(store.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store._publish(folder / "modules" / "x.py", b"text")
    assert files(folder, "modules") == []


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", str(tmp_path / "chosen"))
    assert store_folder() == tmp_path / "chosen"
    monkeypatch.delenv("FLEXDECODE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store_folder() == tmp_path / "flexdecode"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    assert store_folder() == tmp_path / "home" / ".cache" / "flexdecode"


def test_modules_can_be_read_by_their_owner(folder):
    path = stored_module("an identity", Generator())
    assert path.stat().st_mode & stat.S_IRUSR
    assert os.access(path, os.R_OK)


# --- In memory --------------------------------------------------------------------------------------------------------


def test_bounded_forgets_the_oldest():
    kept = Bounded(limit=3)
    for number in range(5):
        kept.add(number, str(number))
    assert kept == {2: "2", 3: "3", 4: "4"}
    kept.add(2, "again")
    assert len(kept) <= 3 and kept[2] == "again"


def test_counters(folder):
    assert cache_info() == CacheInfo(calls=0, hits=0, traces=0, generations=0, compilations=0, disk_hits=0)
    stored_module("an identity", Generator())
    assert cache_info() == CacheInfo(generations=1)
    clear_cache()
    assert cache_info() == CacheInfo()


# --- Import -----------------------------------------------------------------------------------------------------------


def python(code, **environment):
    """Runs code in a fresh interpreter and gives what it printed."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_writes_nothing(tmp_path):
    python("import flexdecode", FLEXDECODE_CACHE_DIR=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1")
    assert list(tmp_path.iterdir()) == []


def test_a_call_on_the_cpu_imports_no_triton(tmp_path):
    python(
        """
        import sys
        import torch, flexdecode
        q, k = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 4, 16)
        before = set(sys.modules)
        flexdecode.flex_decode(q, k, k, flexdecode.mods.softcap(2.0), flexdecode.mods.causal())
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        assert not new & {"triton", "sympy", "matplotlib"}, new
        """,
        FLEXDECODE_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert list(tmp_path.iterdir()) == []


# --- Where code lies --------------------------------------------------------------------------------------------------


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", "~/x")
    assert stored_module("an identity", Generator()).is_relative_to(tmp_path / "x")
    assert not (tmp_path / "~").exists()
    monkeypatch.delenv("FLEXDECODE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/y")
    assert store_folder() == tmp_path / "y" / "flexdecode"


def test_a_new_cache_folder_belongs_to_its_user_alone(folder):
    stored_module("an identity", Generator())
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_cache_folder_that_everybody_can_write_into(folder):
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError) as caught:
        stored_module("an identity", Generator())
    assert str(caught.value) == (
        f"everybody can write into the cache folder {folder}, and flexdecode imports code from there: `chmod o-w` it, "
        "or choose another one by FLEXDECODE_CACHE_DIR"
    )
    folder.chmod(0o775)  # of a group that shares it
    assert stored_module("an identity", Generator()).is_relative_to(folder)


@pytest.mark.parametrize("name", ["index", "modules", "kernels", "helpers"])
def test_a_part_of_the_cache_folder_that_everybody_can_write_into(folder, name):
    umask = os.umask(0)
    try:
        for kind in store.SUFFIXES:
            store.keep(kind, "an identity", b"content")
    finally:
        os.umask(umask)
    assert not (folder / name).stat().st_mode & stat.S_IWOTH
    (folder / name).chmod(0o777)
    with pytest.raises(PermissionError, match=f"everybody can write into the cache folder {folder / name}, "):
        stored_module("another identity", Generator())


@pytest.fixture
def fallback(monkeypatch, tmp_path):
    """The fallback folder, which is not made yet; nothing can be written elsewhere."""
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", str(unwritable(tmp_path / "taken")))
    monkeypatch.setattr(store.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / f"flexdecode-{os.getuid()}"


def refused_fallback(fallback, reason):
    with pytest.raises(PermissionError) as caught:
        stored_module("an identity", Generator())
    assert str(caught.value) == (
        f"{fallback} {reason}, and flexdecode imports code from there: remove it, or choose a folder of your own by "
        "FLEXDECODE_CACHE_DIR"
    )


def test_the_fallback_folder_belongs_to_its_user_alone(fallback):
    for _ in range(2):
        assert stored_module("an identity", Generator()).parent == fallback
    assert stat.S_IMODE(fallback.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_fallback_folder_that_is_open_to_others(fallback, mode):
    fallback.mkdir()
    fallback.chmod(mode)
    refused_fallback(fallback, "is open to others")
    assert list(fallback.iterdir()) == []


def test_a_fallback_folder_that_is_a_link_or_a_file(fallback, tmp_path):
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    fallback.symlink_to(tmp_path / "elsewhere")
    refused_fallback(fallback, "is no folder")
    fallback.unlink()
    fallback.write_text("")
    refused_fallback(fallback, "is no folder")


def test_a_fallback_folder_of_another_user(fallback, monkeypatch):
    fallback.mkdir(mode=0o700)
    uid = os.getuid()
    monkeypatch.setattr(store.os, "getuid", lambda: uid + 1)
    fallback.rename(fallback.with_name(f"flexdecode-{uid + 1}"))
    refused_fallback(fallback.with_name(f"flexdecode-{uid + 1}"), "belongs to another user")
