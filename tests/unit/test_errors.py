"""The three lines of an error about a mod: the problem, the user's own line, the remedy."""

import linecache

import pytest
import torch

import flexdecode
from flexdecode import FlexDecodeError, TraceError, UnsupportedOpError, flex_decode
from flexdecode.errors import CompileError, at_user_line, user_line

QUERY, KEY = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 4, 16)


def message(score_mod):
    with pytest.raises(FlexDecodeError) as caught:
        flex_decode(QUERY, KEY, KEY, score_mod)
    return str(caught.value)


def place(mark):
    """`file:line` of the line of this file that ends in the comment `mark`."""
    (line,) = (n for n, line in enumerate(linecache.getlines(__file__), 1) if line.endswith(f"  # {mark}\n"))
    return f"{__file__}:{line}"


def test_kinds():
    assert issubclass(UnsupportedOpError, TraceError)
    assert issubclass(TraceError, FlexDecodeError) and issubclass(CompileError, FlexDecodeError)
    for name in ("FlexDecodeError", "TraceError", "UnsupportedOpError", "CompileError"):
        assert getattr(flexdecode, name).__module__ == "flexdecode.errors"


def test_user_line_is_the_callers():
    found = user_line()  # the caller
    assert found == f"{place('the caller')}, in test_user_line_is_the_callers: found = user_line()  # the caller"


def test_user_line_without_source():
    found = eval(compile("user_line()", "<no file>", "eval"))
    assert found == "<no file>:1, in <module>"


def test_three_lines():
    problem, line, remedy = str(at_user_line(UnsupportedOpError, "the problem", "The remedy.")).splitlines()
    assert (problem, remedy) == ("the problem", "  The remedy.")
    assert line.startswith(f"  {__file__}:")


def test_the_line_is_in_the_mod():
    def my_mod(score, b, h, q_idx, kv_idx):
        limit = q_idx - 3
        if kv_idx > limit:  # the branch
            return score
        return -score

    problem, line, remedy = message(my_mod).splitlines()
    assert line == f"  {place('the branch')}, in my_mod: if kv_idx > limit:  # the branch"
    assert "truth of a traced value" in problem
    assert "torch.where" in remedy


def test_the_line_is_in_a_helper_of_the_mod():
    def helper(x):
        return x.cumsum(0)  # the helper

    text = message(lambda score, b, h, q_idx, kv_idx: score + helper(score))
    assert f"{place('the helper')}, in helper: return x.cumsum(0)" in text


def test_the_line_of_an_exception_inside_a_library_is_the_users():
    """PyTorch or flexdecode raises, in the course of a call that the mod makes."""

    def my_mod(score, b, h, q_idx, kv_idx):
        return torch.nn.functional.gelu(score).no_such_method()  # no such method

    text = message(my_mod)
    assert "score_mod raised AttributeError: 'Tensor' object has no attribute 'no_such_method'" in text
    assert f"{place('no such method')}, in my_mod: " in text
    number = 2**70
    text = message(lambda score, b, h, q_idx, kv_idx: score + number)  # too large
    assert f"{place('too large')}, in <lambda>: " in text


def test_the_cause_is_kept():
    def my_mod(score, b, h, q_idx, kv_idx):
        return {}["missing"]

    with pytest.raises(TraceError, match="score_mod raised KeyError: 'missing'") as caught:
        flex_decode(QUERY, KEY, KEY, my_mod)
    assert isinstance(caught.value.__cause__, KeyError)
