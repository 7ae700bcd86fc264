"""`flexdecode cache`: lists, measures and clears the store."""

import io
import os
import time

import pytest
import torch

from flexdecode import clear_cache, explain, mods
from flexdecode.call.candidates import DEFAULT, Choice
from flexdecode.codegen.kernels import standalone
from flexdecode.codegen.store import find, fixed_module, keep
from flexdecode.codegen.tuned import Tuned, keep_tuned


@pytest.fixture
def modules(store):
    """Three modules: with a mask, with both mods, and the second pass."""
    clear_cache()
    query, key = torch.empty(1, 4, 1, 64, device="meta"), torch.empty(1, 2, 256, 64, device="meta")
    paths = [
        explain(query, key, key, None, mods.causal(), device="H200").source,
        explain(query, key, key, mods.softcap(3.0), mods.causal(), device="H200").source,
        explain(query, key, key, mods.softcap(3.0), device="H200").source,
        explain(query, key, key, device="H200").source,
        fixed_module(standalone("combine.py")),
    ]
    for path in paths:
        assert path.is_relative_to(store)
    return paths


KINDS = [
    "Split-KV decode attention, with mask_mod",
    "Split-KV decode attention, with score_mod and mask_mod",
    "Split-KV decode attention, with score_mod",
    "Split-KV decode attention",
    "The second pass",
]


def test_list(run, store, modules):
    os.utime(modules[0], (time.time() - 3 * 86400 - 5,) * 2)
    os.utime(modules[1], (time.time() - 2 * 3600 - 5,) * 2)
    done = run("cache", "list")
    assert done.status == 0
    rows = {line.split("  ")[0]: line for line in done.out.splitlines() if "KiB" in line and " in " not in line}
    assert set(rows) == {path.stem for path in modules}
    for path, kind in zip(modules, KINDS, strict=True):
        assert rows[path.stem].endswith(f"  {kind}")
        assert f"  {path.stat().st_size / 1024:.1f} KiB  " in rows[path.stem].replace("   ", "  ")
    assert "   3 d  " in rows[modules[0].stem] and "   2 h  " in rows[modules[1].stem]
    total = sum(path.stat().st_size for path in modules)
    assert f"5 modules, {total / 1024:.1f} KiB, in {store}\n" in done.out


def test_size(run, store, modules):
    total = sum(path.stat().st_size for path in modules)
    first, second = run("cache", "size").out.splitlines()
    assert first == f"5 modules, {total / 1024:.1f} KiB, in {store}"
    assert second.startswith("What Triton itself keeps is not part of it: that is in ")


def test_kernels_are_counted_and_cleared(run, store, modules):
    keep("kernels", "one", b"x" * 1024)
    assert run("cache", "size").out.startswith("5 modules and 1 kernel, ")
    keep("kernels", "two", b"y" * 1024)
    done = run("cache", "clear", "--yes")
    assert done.out.endswith("\n5 modules and 2 kernels removed.\n")
    assert [path for path in store.rglob("*") if path.is_file()] == []


@pytest.fixture
def schedules(store):
    """Two measured schedules and a damaged one, in the order in which they were made."""
    for i, choice in enumerate((Choice(num_splits=16, schedule="split"), DEFAULT)):
        keep_tuned(f"call {i}", Tuned(choice, 4, 50.0, 40.0, (("the default", 50.0), ("num_splits=16", 40.0))))
    keep("schedules", "call 2", b"no json")
    found = [find("schedules", f"call {i}") for i in range(3)]
    for age, path in zip((300, 200, 100), found, strict=True):
        os.utime(path, (time.time() - age,) * 2)
    return found


def test_schedules(run, store, modules, schedules):
    total = sum(path.stat().st_size for path in (*modules, *schedules))
    where = f"5 modules and 3 schedules, {total / 1024:.1f} KiB, in {store}"
    lines = run("cache", "list").out.splitlines()
    assert [line.split("  ")[0] for line in lines[5:8]] == [path.stem for path in reversed(schedules)]
    assert [line[line.index(" min  ") + 6 :] for line in lines[5:8]] == [
        "A damaged schedule",
        "Schedule, the default is the fastest of 2 schedules: 50.0 us",
        "Schedule, num_splits=16, schedule='split': 40.0 us, the default 50.0 us; 2 schedules were measured",
    ]
    assert lines[8] == where == run("cache", "size").out.splitlines()[0]
    done = run("cache", "clear", "--yes")
    assert done.out.endswith("\n5 modules and 3 schedules removed.\n")
    assert not any(path.exists() for path in (*modules, *schedules))


def test_schedules_alone(run, store, schedules):
    schedules[1].unlink()
    schedules[2].unlink()
    assert run("cache", "size").out.startswith("0 modules and 1 schedule, ")
    assert run("cache", "clear", "--yes").out.endswith("\n0 modules and 1 schedule removed.\n")
    assert not schedules[0].exists()


def test_clear(run, store, modules):
    (store / "notes.txt").write_text("of the user")
    done = run("cache", "clear", "--yes")
    assert done.status == 0 and done.out.endswith("\n5 modules removed.\n")
    assert [path for path in store.rglob("*") if path.is_file()] == [store / "notes.txt"]
    assert run("cache", "size").out.startswith(f"0 modules, 0.0 KiB, in {store}\n")


@pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("n\n", 5), ("\n", 5)])
def test_clear_asks(run, store, modules, monkeypatch, answer, left):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(answer.encode())))
    done = run("cache", "clear")
    assert done.status == 0 and "Remove them? [y/N]: " in done.out
    assert ("Nothing was removed." in done.out) == (left > 0)
    assert len(list((store / "modules").glob("*.py"))) == left


def test_clear_where_nobody_answers(run, store, modules, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO()))
    done = run("cache", "clear")
    assert done.status == 2
    assert done.err.strip() == "flexdecode: nothing was confirmed; `--yes` answers beforehand"
    assert all(path.exists() for path in modules)


def test_an_empty_store(run, store):
    for command in ("list", "size", "clear"):
        assert run("cache", command).out.startswith(f"0 modules, 0.0 KiB, in {store}\n")
    assert not store.exists()


def test_a_damaged_folder(run, store):
    """A file where the folder should be, and a module that is no text."""
    store.write_text("no folder")
    assert run("cache", "list").out.startswith("0 modules")
    store.unlink()
    (store / "modules").mkdir(parents=True)
    (store / "modules" / "0.py").write_bytes(b"\xff\x00\xfe")
    done = run("cache", "list")
    assert done.status == 0 and done.out.startswith("0  ")


def test_a_folder_that_cannot_be_cleared(run, store, modules, monkeypatch):
    def refuse(path, missing_ok=False):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    done = run("cache", "clear", "--yes")
    assert done.status == 2
    assert done.err == f"flexdecode: Permission denied: {sorted(modules)[0]}\n"
