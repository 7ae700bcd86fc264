"""`flexdecode doctor`: its lines, and the tables of what is known."""

import json
import os
import re

import pytest
import torch

import flexdecode
from flexdecode.call.device import KNOWN_DEVICES, DeviceFacts
from flexdecode.cli import doctor
from flexdecode.cli.findings import PAIRS, SLOW, Machine
from flexdecode.triton_api import NEWEST, OLDEST

H200, A100, MI300X = (KNOWN_DEVICES[name][0] for name in ("H200", "A100", "MI300X"))
GOOD = Machine(torch=(2, 11), triton=(3, 9), numpy=(2, 3), device=H200, environment={})


def lines(run, *words):
    """The lines of a report by part and name."""
    done = run("doctor", "--json", *words)
    return {(line["part"], line["name"]): line for line in json.loads(done.out)}, done.status


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in ("TRITON_INTERPRET", "TRITON_ALWAYS_COMPILE", "CUDA_LAUNCH_BLOCKING", "CC"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# --- The report -------------------------------------------------------------------------------------------------------


def test_the_text_has_every_line(run, store, no_gpu):
    done, (found, _) = run("doctor"), lines(run)
    assert {part for part, _ in found} == {"versions", "device", "folders", "compiler", "known bad pairs", "slow"}
    for (part, name), line in found.items():
        assert f"{part}\n" in done.out
        assert re.search(rf"^  {re.escape(name)} +(note: |WRONG: )?{re.escape(line['text'])}$", done.out, re.MULTILINE)


def test_versions(run, store, no_gpu):
    found, _ = lines(run)
    assert found["versions", "flexdecode"]["text"] == flexdecode.__version__
    assert found["versions", "torch"]["text"].endswith("  (in the range 2.9 or later)")
    assert found["versions", "triton"]["text"].endswith("  (in the range 3.5 to 3.9)")
    assert all(line["state"] == "ok" for (part, _), line in found.items() if part == "versions")


@pytest.mark.parametrize(
    ("triton", "text", "state", "status"),
    [
        ("3.4.1", "3.4.1  (outside of the range 3.5 to 3.9)", "wrong", 1),
        ("4.0.0", "4.0.0  (outside of the range 3.5 to 3.9)", "note", 0),
        (None, "not installed", "note", 0),
    ],
)
def test_other_versions_of_triton(run, store, no_gpu, monkeypatch, triton, text, state, status):
    known = doctor.importlib.metadata.version

    def version(name):
        if name != "triton":
            return known(name)
        if triton is None:
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return triton

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    found, done = lines(run)
    assert (found["versions", "triton"]["text"], found["versions", "triton"]["state"], done) == (text, state, status)
    assert any(part == "known bad pairs" and name.startswith("Triton is ") for part, name in found)


def test_a_machine_without_a_gpu(run, store, no_gpu):
    found, _ = lines(run)
    assert found["device", "GPU"]["text"] == "none that PyTorch finds"
    assert found["slow", "no GPU"]["text"].startswith("calls run as PyTorch operations on the CPU")
    assert ("device", "architecture") not in found


def test_a_gpu(run, store, monkeypatch):
    monkeypatch.setattr(doctor, "_gpu", lambda: (A100, "NVIDIA A100-SXM4-80GB"))
    found, _ = lines(run)
    texts = [line["text"] for (part, _), line in found.items() if part == "device"]
    assert texts == ["NVIDIA A100-SXM4-80GB", "cuda 80", "108", "163 KiB for one program"]
    slow = {name for part, name in found if part == "slow"}
    assert slow == {"no tensor descriptors", "no dependent launch", "little shared memory", "not tuned"}


def test_the_folder(run, store, no_gpu):
    found, _ = lines(run)
    assert found["folders", "store of modules"]["text"] == f"{store}  (made by the first kernel)"
    assert ("folders", "owner") not in found
    store.mkdir(mode=0o700)
    found, status = lines(run)
    assert found["folders", "store of modules"]["text"] == str(store) and status == 0
    assert found["folders", "owner"]["text"] == doctor._user(os.getuid())
    assert found["folders", "mode"]["text"] == "0700"
    os.chmod(store, 0o777)
    found, status = lines(run)
    assert found["folders", "refused"]["text"].startswith("everybody can write into the cache folder")
    assert found["folders", "mode"]["text"] == "0777" and status == 1


def test_a_folder_of_somebody_else_that_cannot_be_written(run, store, no_gpu, monkeypatch):
    store.mkdir()
    me = os.getuid()
    monkeypatch.setattr("os.getuid", lambda: me + 12345)
    monkeypatch.setattr("os.access", lambda place, mode: False)
    found, _ = lines(run)
    assert found["folders", "owner"] | {"part": ""} == {
        "part": "",
        "name": "owner",
        "text": f"{doctor._user(me)}, and this process is {doctor._user(me + 12345)}",
        "state": "note",
    }
    assert found["folders", "not writable"]["state"] == "note"


def test_the_compiler(run, store, no_gpu, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}" if name == "clang" else None)
    assert lines(run)[0]["compiler", "C"]["text"] == "/bin/clang"
    monkeypatch.setenv("CC", "icc")
    found, status = lines(run)
    assert found["compiler", "C"]["text"].startswith("icc (from CC) is missing") and status == 0
    monkeypatch.setattr(doctor, "_gpu", lambda: (H200, "NVIDIA H200"))
    found, status = lines(run)
    assert found["compiler", "C"]["state"] == "wrong" and status == 1


# --- The tables -------------------------------------------------------------------------------------------------------


def names(table, **changes):
    return [row.name for row in table if row.applies(GOOD._replace(**changes))]


def test_nothing_is_known_against_a_good_machine(run, store, monkeypatch):
    assert names(PAIRS) == [] and names(SLOW) == []
    monkeypatch.setattr(doctor, "_gpu", lambda: (H200, "NVIDIA H200"))
    monkeypatch.setattr(doctor, "_version_of", {"torch": (2, 11), "triton": (3, 9), "numpy": (2, 3)}.get)
    found, _ = lines(run)
    assert found["known bad pairs", "none"]["text"] == "nothing is known against these versions"
    assert found["slow", "nothing"]["text"] == "no known reason"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"torch": (2, 8)}, ["torch is too old"]),
        ({"torch": (2, 9)}, []),
        ({"torch": (3, 0)}, []),
        ({"triton": None}, ["Triton is missing"]),
        ({"triton": (3, 4)}, ["Triton is too old"]),
        ({"triton": (3, 5)}, ["Triton 3.5 and latent caches"]),
        ({"triton": (3, 6)}, []),
        ({"triton": (3, 6), "device": MI300X}, ["Triton 3.6 on an AMD GPU"]),
        ({"triton": (3, 8)}, ["Triton 3.8 on an NVIDIA GPU"]),
        ({"triton": (3, 8), "device": MI300X}, []),
        ({"triton": (3, 10)}, ["Triton is newer than tested"]),
        ({"triton": (3, 6), "numpy": (2, 4)}, []),
        ({"environment": {"TRITON_INTERPRET": "1"}}, ["Triton interprets bfloat16 wrongly"]),
        (
            {"triton": (3, 6), "numpy": (2, 4), "environment": {"TRITON_INTERPRET": "1"}},
            ["Triton up to 3.6 interprets with NumPy below 2.4 only", "Triton interprets bfloat16 wrongly"],
        ),
        (
            {"triton": (3, 9), "numpy": (2, 4), "environment": {"TRITON_INTERPRET": "1"}},
            ["Triton interprets bfloat16 wrongly"],
        ),
    ],
)
def test_known_bad_pairs(changes, expected):
    assert names(PAIRS, **changes) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"device": None}, ["no GPU"]),
        ({"device": KNOWN_DEVICES["B200"][0]}, ["not tuned"]),
        ({"device": MI300X}, ["no tensor descriptors", "no dependent launch", "little shared memory", "not tuned"]),
        ({"device": DeviceFacts("cuda", 90, 132, 1000)}, ["little shared memory"]),
        ({"environment": {"TRITON_INTERPRET": "1"}}, ["TRITON_INTERPRET=1"]),
        ({"environment": {"TRITON_ALWAYS_COMPILE": "1"}}, ["TRITON_ALWAYS_COMPILE is set"]),
        ({"environment": {"CUDA_LAUNCH_BLOCKING": "1"}}, ["CUDA_LAUNCH_BLOCKING is set"]),
        ({"environment": {"CUDA_LAUNCH_BLOCKING": "0", "TRITON_ALWAYS_COMPILE": ""}}, []),
    ],
)
def test_what_is_slow(changes, expected):
    assert names(SLOW, **changes) == expected


def test_the_range_is_that_of_the_library():
    for triton in (OLDEST, NEWEST):
        found = names(PAIRS, triton=triton)
        assert "Triton is too old" not in found and "Triton is newer than tested" not in found
