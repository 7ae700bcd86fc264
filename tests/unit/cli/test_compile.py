"""`flexdecode compile`: what it asks of `flexdecode.save_kernels`."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import flexdecode

SHAPE = "B=2,Hq=8,Hkv=2,N=1024,D=64"


class Saved(NamedTuple):
    """The part of a record of `save_kernels` that is printed."""

    kernel: str
    files: tuple[Path, ...] | None
    num_bytes: int
    was_there: bool


@pytest.fixture
def calls(monkeypatch):
    """Notes the calls of `save_kernels` in place of compiling."""
    found = []

    def save_kernels(folder, *arguments, device, **keywords):
        found.append((folder, arguments, device, keywords))
        return [
            Saved("decode_split", (folder / "kernels" / "5583.cubin", folder / "a.py"), 84032, len(found) > 1),
            Saved("decode_combine", None, 0, False),
        ]

    monkeypatch.setattr(flexdecode, "save_kernels", save_kernels, raising=False)
    return found


def test_shapes_and_mods_of_a_call(run, calls, mods_file, tmp_path):
    more = "B=4,Hq=8,Hkv=2,N=1024,D=64,Q=2"
    place = ("--device", "H100", "-o", tmp_path / "kernels")
    done = run("compile", f"{mods_file}:window_100", f"{mods_file}:alibi", "--shape", SHAPE, "--shapes", more, *place)
    assert (done.status, done.err) == (0, "")
    failed = "  decode_combine  did not compile; another kernel takes its place"
    assert done.out.splitlines() == [
        SHAPE,
        "  decode_split     82.1 KiB  compiled   5583.cubin",
        failed,
        more,
        "  decode_split     82.1 KiB  was there  5583.cubin",
        failed,
        f"In {tmp_path / 'kernels'}",
    ]
    for (folder, arguments, device, keywords), (batch, tokens) in zip(calls, [(2, 1), (4, 2)], strict=True):
        query, key, value, score, mask = arguments
        assert (folder, device, keywords) == (tmp_path / "kernels", "H100", {})
        assert (score.__name__, mask.__name__) == ("alibi", "window_100")
        assert (list(query.shape), query.dtype) == ([batch, 8, tokens, 64], torch.bfloat16)
        assert list(key.shape) == list(value.shape) == [batch, 2, 1024, 64]
        assert query.is_meta and key.is_meta and value.is_meta


def test_what_else_is_part_of_a_kernel(run, calls, tmp_path):
    place = ("--device", "MI300X", "-o", tmp_path, "--shape", SHAPE)
    words = ("--dtype", "fp16", "--kv-dtype", "fp8_e5m2", "--kv-lens", "int64", "--page-size", "16", "--return-lse")
    assert run("compile", *place, *words).status == 0
    ((_, (query, key, _, score, mask), _, keywords),) = calls
    assert (query.dtype, key.dtype, list(key.shape)) == (torch.float16, torch.float8_e5m2, [128, 2, 16, 64])
    assert score is None and mask is None and keywords["return_lse"] is True
    assert keywords["kv_lens"].dtype == torch.int64 and keywords["kv_lens"].tolist() == [1024, 1024]
    assert list(keywords["page_table"].shape) == [2, 64] and keywords["page_table"].dtype == torch.int32
    calls.clear()
    assert run("compile", *place, "--kv-lens", "int32").status == 0
    assert calls[0][3]["kv_lens"].dtype == torch.int32 and set(calls[0][3]) == {"kv_lens"}


def test_a_wrong_shape_compiles_nothing(run, calls, tmp_path):
    words = ("--shape", SHAPE, "--shape", "B=1", "--device", "H100", "-o", tmp_path)
    assert run("compile", *words).mistake().startswith("--shape 'B=1': Hq, Hkv, N, D are missing")
    assert not calls


def test_what_save_kernels_refuses(run, monkeypatch, tmp_path):
    words = ("compile", "--shape", SHAPE, "--device", "H20", "-o", tmp_path)
    for error in (
        ValueError("`device` must be ..."),
        flexdecode.CompileError("decode_split did not compile\n  source: a.py"),
        PermissionError(13, "Permission denied", str(tmp_path)),
    ):

        def refuse(*arguments, error=error, **keywords):
            raise error

        monkeypatch.setattr(flexdecode, "save_kernels", refuse, raising=False)
        expected = f"Permission denied: {tmp_path}" if isinstance(error, OSError) else str(error)
        assert run(*words).mistake() == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--shape", SHAPE), "Missing option '--device'."),
        (("--shape", SHAPE, "--device", "H100"), "Missing option '-o' / '--output'."),
    ],
)
def test_words_that_are_missing(run, words, message):
    assert run("compile", *words).mistake().startswith(message)
