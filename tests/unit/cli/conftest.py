"""Runs command lines in this process, and writes files of mods."""

from typing import NamedTuple

import pytest

from flexdecode.cli import main

SHAPE = ("--shape", "B=2,Hq=8,Hkv=2,N=1024,D=64")


class Done(NamedTuple):
    status: int
    out: str
    err: str

    def mistake(self) -> str:
        """The message of a user's mistake, which is all that is printed."""
        assert self.status == 2 and self.out == ""
        assert self.err.startswith("flexdecode: ") and self.err.endswith("\n") and "Traceback" not in self.err
        return self.err.removeprefix("flexdecode: ")[:-1]


@pytest.fixture
def run(capsys):
    """Runs a command line; gives its exit status and what it printed."""

    def run(*arguments):
        capsys.readouterr()
        return Done(main([str(argument) for argument in arguments]), *capsys.readouterr())

    return run


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An empty store of modules of this test alone."""
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def write(tmp_path):
    """Writes a file of mods; gives its path."""

    def write(text, name="my_mods.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def mods_file(write):
    return write(MODS)


MODS = """
import functools

import torch

slopes = torch.ones(8)


def alibi(score, b, h, q_idx, kv_idx):
    return score - slopes[h] * (q_idx - kv_idx)


def window_100(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (q_idx - kv_idx < 100)


def make():
    return window_100


def window(width, *, sink=0):
    def mask(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & ((q_idx - kv_idx < width) | (kv_idx < sink))

    return mask


def up_to(last, b, h, q_idx, kv_idx):
    return kv_idx <= last


partial = functools.partial(up_to, 4)


class Prefix:
    def __init__(self, length):
        self.length = length

    def __call__(self, b, h, q_idx, kv_idx):
        return kv_idx < self.length

    def keep(self, b, h, q_idx, kv_idx):
        return kv_idx >= self.length


prefix = Prefix(7)


def two(a, b):
    return a


def three():
    return 3


def any_number(*indices):
    return indices[-1] >= 0


def branches(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx and True


def fails():
    raise RuntimeError("first line\\nsecond line")


def calls_what_is_missing(b, h, q_idx, kv_idx):
    return missing(kv_idx)
"""
