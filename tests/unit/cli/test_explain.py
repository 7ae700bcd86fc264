"""`flexdecode explain`: mods of files, shapes, devices, pictures and pages, and what is wrong with them."""

import os

import pytest
import torch

from flexdecode import explain, mods

SHAPE = ("--shape", "B=2,Hq=8,Hkv=2,N=1024,D=64")


def inputs(dtype=torch.bfloat16, cache_dtype=None, **sizes):
    s = {"B": 2, "Hq": 8, "Hkv": 2, "N": 1024, "D": 64, "Q": 1, "Dv": 64} | sizes
    kind = cache_dtype or dtype
    return (
        torch.empty(s["B"], s["Hq"], s["Q"], s["D"], dtype=dtype, device="meta"),
        torch.empty(s["B"], s["Hkv"], s["N"], s["D"], dtype=kind, device="meta"),
        torch.empty(s["B"], s["Hkv"], s["N"], s["Dv"], dtype=kind, device="meta"),
    )


# --- What it prints ---------------------------------------------------------------------------------------------------


def test_the_report_is_that_of_the_library(run):
    done = run("explain", "mods:alibi(8)", "mods:sliding_window(100)", *SHAPE, "--device", "B200")
    expected = explain(*inputs(), mods.alibi(8), mods.sliding_window(100), device="B200")
    assert done == (0, f"{expected}\n", "")


def test_all_words_of_a_call(run):
    shape = "B=2,Hq=8,Hkv=4,N=1000,D=64,Q=3,Dv=32"
    words = ("--dtype", "fp16", "--kv-dtype", "fp8_e5m2", "--kv-lens", "1000, 7", "--device", "A100")
    done = run("explain", "--shape", shape, *words)
    call = inputs(torch.float16, torch.float8_e5m2, Hkv=4, N=1000, Q=3, Dv=32)
    assert done == (0, f"{explain(*call, kv_lens=torch.tensor([1000, 7]), device='A100')}\n", "")
    assert run("explain", "--shape", shape, *words[:4], "--kv-lens", "7", *words[6:]).out == (
        f"{explain(*call, kv_lens=torch.tensor([7, 7]), device='A100')}\n"
    )


def test_pages(run):
    done = run("explain", *SHAPE, "--page-size", 48, "--device", "H100")
    assert "key [44, 2, 48, 64], value [44, 2, 48, 64], bfloat16" in done.out  # 22 pages of each of two sequences
    assert "from pages of 48" in done.out


def test_without_a_device_it_says_which_one(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = run("explain", *SHAPE).out
    assert "  device    H200: " in out
    assert out.endswith("\n\nThere is no GPU here, so this is for H200. `--device` names another one.\n")
    assert "There is no GPU" not in run("explain", *SHAPE, "--device", "H200").out


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml")])
def test_pictures(run, tmp_path, name, start):
    pytest.importorskip("matplotlib")
    assert run("explain", "mods:causal", *SHAPE, "--png", tmp_path / name).status == 0
    assert (tmp_path / name).read_bytes().startswith(start)


def test_pages_of_html(run, tmp_path):
    assert run("explain", "mods:causal", *SHAPE, "--html", tmp_path / "a.html").status == 0
    text = (tmp_path / "a.html").read_text()
    assert text.startswith("<!doctype html>") and "<title>causal</title>" in text and "kv_idx &lt;= q_idx" in text


# --- Mods -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("alibi", "score_mod alibi\n  formula   score - slopes[h] * (q_idx - kv_idx)\n"),
        ("window_100", "mask_mod window_100\n"),
        ("make", "mask_mod window_100\n"),
        ("window(64)", "width = 64  (run-time argument)"),
        ("window(64, sink=4)", "sink = 4  (run-time argument)"),
        ("partial", "mask_mod partial\n"),
        ("prefix", "mask_mod Prefix\n"),
        ("prefix.keep", "mask_mod keep\n"),
        ("Prefix(5)", "mask_mod Prefix\n"),
    ],
)
def test_mods_of_a_file(run, mods_file, name, shown):
    done = run("explain", f"{mods_file}:{name}", *SHAPE)
    assert done.status == 0 and shown in done.out


def test_the_kind_may_be_given(run, mods_file):
    out = run("explain", "--score-mod", f"{mods_file}:alibi", "--mask-mod", f"{mods_file}:any_number", *SHAPE).out
    assert "score_mod alibi\n" in out and "mask_mod any_number\n" in out


def test_a_file_is_imported_once_and_finds_what_lies_beside_it(run, write):
    write("width = 33\n", "sizes_beside.py")
    path = write("print('imported')\nfrom sizes_beside import width\n"
                 "def score(s, b, h, q, k):\n    return s\n"
                 "def mask(b, h, q, k):\n    return q - k < width\n")  # fmt: skip
    out = run("explain", f"{path}:mask", f"{path}:score", *SHAPE).out
    assert out.count("imported\n") == 1 and "width = 33" in out and "score_mod score\n" in out


def test_a_path_with_a_colon(run, write):
    path = write("def mask(b, h, q, k):\n    return k <= q\n", "a:b.py")
    assert "mask_mod mask\n" in run("explain", f"{path}:mask", *SHAPE).out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nope", "{file} has no 'nope'"),
        ("prefix.nope", "{file} has no 'prefix.nope'"),
        ("slopes", "{file}:slopes is no function, but Tensor"),
        (
            "two",
            "{file}:two is no mod: it takes (a, b); a score_mod takes (score, b, h, q_idx, kv_idx), "
            "a mask_mod takes (b, h, q_idx, kv_idx)",
        ),
        ("any_number", "{file}:any_number takes 4 parameters and also 5: say --score-mod {file}:any_number or "
         "--mask-mod {file}:any_number"),
        (
            "three",
            "{file}:three is no mod: it is of type int; a score_mod takes (score, b, h, q_idx, kv_idx), "
            "a mask_mod takes (b, h, q_idx, kv_idx)",
        ),
        ("fails", "{file}:{line}: RuntimeError: first line"),
        ("window(x)", "'{file}:window(x)': what follows the colon is no name, and no call of one with plain values"),
        ("window(", "'{file}:window(': what follows the colon is no name, and no call of one with plain values"),
        ("1", "'{file}:1': '1' is no name"),
        ("", "'{file}:' names no mod: write FILE:NAME, for example my_mods.py:alibi"),
        ("window()", "window() missing 1 required positional argument: 'width'"),
    ],
)  # fmt: skip
def test_names_that_are_no_mod(run, mods_file, name, message):
    line = mods_file.read_text().splitlines().index('    raise RuntimeError("first line\\nsecond line")') + 1
    expected = message.format(file=mods_file, line=line)
    assert run("explain", f"{mods_file}:{name}", *SHAPE).mistake() == expected


def test_mods_of_the_wrong_kind(run, mods_file):
    place = f"{mods_file}:alibi"
    assert run("explain", "--mask-mod", place, *SHAPE).mistake() == (
        f"{place} is no mask_mod: it takes (score, b, h, q_idx, kv_idx); a mask_mod takes (b, h, q_idx, kv_idx)"
    )
    assert run("explain", place, "--score-mod", place, *SHAPE).mistake() == (
        f"{place} is a second score_mod; a call takes one (flexdecode.mods has functions that combine two)"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n1 / 0\n", "2: ZeroDivisionError: division by zero"),
        ("x = 1\n\ndef (\n", "3: SyntaxError: invalid syntax"),
        ("import no_such_module\n", "1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("import sys\nsys.exit(3)\n", "2: SystemExit: 3"),
        ("def f():\n    raise ValueError('a\\nb')\n\nf()\n", "2: ValueError: a"),
        ("raise ValueError\n", "1: ValueError"),
    ],
)
def test_files_that_do_not_import(run, write, text, message):
    path = write(text)
    assert run("explain", f"{path}:mod", *SHAPE).mistake() == f"{path}:{message}"


def test_places_without_a_file(run, tmp_path):
    assert run("explain", "no.py:mod", *SHAPE).mistake() == "no.py: there is no such file"
    assert run("explain", f"{tmp_path}:mod", *SHAPE).mistake() == f"{tmp_path}: there is no such file"
    for place in ("mod", ":mod", "mods:"):
        assert run("explain", place, *SHAPE).mistake() == (
            f"{place!r} names no mod: write FILE:NAME, for example my_mods.py:alibi"
        )
    assert run("explain", "mods:nope", *SHAPE).mistake() == "mods has no 'nope'"
    assert run("explain", "mods:sliding_window(0)", *SHAPE).mistake() == "`window` must be from 1 to sys.maxsize, got 0"


def test_mods_that_cannot_be_traced_keep_their_lines(run, mods_file):
    problem, line, remedy = run("explain", f"{mods_file}:branches", *SHAPE).mistake().splitlines()
    assert problem == "the truth of a traced value was asked for in a mask_mod"
    assert line.startswith(f"  {mods_file}:") and line.endswith("in branches: return kv_idx <= q_idx and True")
    assert "torch.where" in remedy
    message = run("explain", f"{mods_file}:calls_what_is_missing", *SHAPE).mistake()
    assert "NameError: name 'missing' is not defined" in message and f"{mods_file}:" in message


# --- Shapes and other words -------------------------------------------------------------------------------------------

EXAMPLE = "; write for example B=8,Hq=32,Hkv=8,N=32768,D=128"


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ("", "'' is no NAME=NUMBER with a name of B, Hq, Hkv, N, D, Q, Dv"),
        ("B=2,Hq", "Hq must be a number from 1 to 2147483647, got ''"),
        ("B=2,hq=8", "'hq=8' is no NAME=NUMBER with a name of B, Hq, Hkv, N, D, Q, Dv"),
        ("B=2,Hq=8,Hkv=2,N=1024", "D is missing"),
        ("B=2,Hq=8", "Hkv, N, D are missing"),
        ("B=0,Hq=8,Hkv=2,N=1,D=1", "B must be a number from 1 to 2147483647, got '0'"),
        ("B=-1,Hq=8,Hkv=2,N=1,D=1", "B must be a number from 1 to 2147483647, got '-1'"),
        ("B=1.5,Hq=8,Hkv=2,N=1,D=1", "B must be a number from 1 to 2147483647, got '1.5'"),
        ("B=²,Hq=8,Hkv=2,N=1,D=1", "B must be a number from 1 to 2147483647, got '²'"),
        (f"B={2**31},Hq=8,Hkv=2,N=1,D=1", f"B must be a number from 1 to 2147483647, got '{2**31}'"),
        (
            f"B=9,Hq=1,Hkv={2**30},N={2**30},D=64",
            "these sizes are more than any memory holds",
        ),
        ("B=1,B=2,Hq=8,Hkv=2,N=1,D=1", "B is given twice"),
        ("2,8,1,64", "'2' is no NAME=NUMBER with a name of B, Hq, Hkv, N, D, Q, Dv"),
    ],
)
def test_shapes_that_are_none(run, shape, problem):
    assert run("explain", "--shape", shape).mistake() == f"--shape {shape!r}: {problem}{EXAMPLE}"


def test_spaces_in_a_shape(run):
    assert run("explain", "--shape", "B=2, Hq=8, Hkv = 2, N=1024, D=64").out == run("explain", *SHAPE).out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dtype", "fp17"), "--dtype 'fp17': choose from fp16, bf16, fp32"),
        (("--dtype", "fp8_e4m3"), "--dtype 'fp8_e4m3': choose from fp16, bf16, fp32"),
        (("--kv-dtype", "int8"), "--kv-dtype 'int8': choose from fp16, bf16, fp32, fp8_e4m3, fp8_e5m2"),
        (("--kv-lens", "1,x"), "--kv-lens '1,x': write numbers with commas, or int32 or int64 for full sequences"),
        (("--kv-lens", "1,2,3"), "--kv-lens '1,2,3': there are 3 lengths for B = 2 sequences"),
        (("--kv-lens", "1025"), "--kv-lens '1025': a length is at most N = 1024, got 1025"),
        (("--kv-lens", f"1,{10**30}"), f"--kv-lens '1,{10**30}': a length is at most N = 1024, got {10**30}"),
        (
            ("--device", "H20"),
            '`device` must be "H100", "H200", "A100", "B200", "MI300X" or "cuda" for the present GPU, or facts of '
            "your own (see explain), got 'H20'",
        ),
        (("--page-size", "1025"), "--page-size 1025: a page has at most N = 1024 tokens"),
        (("--png", "a.jpg"), "`path` must end in .png, .svg or .pdf, got 'a.jpg'"),
        (("--html", "/no/such/folder/a.html"), "No such file or directory: /no/such/folder/a.html"),
    ],
)
def test_words_that_are_wrong(run, words, message):
    assert run("explain", *SHAPE, *words).mistake() == message


def test_long_names_of_dtypes(run):
    short = run("explain", *SHAPE, "--dtype", "fp16", "--kv-dtype", "fp8_e5m2").out
    assert run("explain", *SHAPE, "--dtype", "float16", "--kv-dtype", "float8_e5m2").out == short


def test_cuda_without_a_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "`device=\"cuda\"` is the present GPU, and PyTorch finds none" in run(
        "explain", *SHAPE, "--device", "cuda"
    ).mistake()  # fmt: skip


def test_heads_that_do_not_fit(run):
    message = run("explain", "--shape", "B=1,Hq=4,Hkv=3,N=16,D=16").mistake()
    assert message.startswith("`query` must have a multiple of the heads of `key`, got Hq = 4 and Hkv = 3")


def test_a_store_that_everybody_can_write_to(run, store):
    store.mkdir()
    os.chmod(store, 0o777)
    message = run("explain", "mods:causal", *SHAPE).mistake()
    assert message.startswith(f"everybody can write into the cache folder {store}") and "\n" not in message
