"""Runs a case and compares it with the reference."""

import warnings
from dataclasses import replace
from unittest.mock import patch

import torch
from support import assert_close, pytorch_decode

from flexdecode import DecodeOptions, flex_decode
from flexdecode.errors import SharedMemoryError
from flexdecode.reference import reference_decode
from flexdecode.runtime import eager, products

from .case import Case
from .tensors import Inputs

POOLED = 24  # draws of the contents by which an error that is a little too large is judged
_TILES = ("block_n", "num_warps", "num_stages")


class InvalidCaseError(Exception):
    """The generator is at fault: a case cannot be built, or the reference refuses it."""


def check(case: Case) -> None:
    """Runs a case.

    An error is compared with that of PyTorch on the same numbers, by the rule of `support`. With few numbers that is a
    matter of luck, so where it is the only complaint the rule decides over several draws of the contents together.

    Raises:
        AssertionError: the result is not the reference's.
        InvalidCaseError: the case is not valid.
        Exception: what `flex_decode` raises.
    """
    result = _Result(case)
    try:
        # An error of 1e-5 is always allowed, so PyTorch's own is computed only where it matters.
        assert_close(result.out, result.lse, result.expected, result.expected)
        return
    except AssertionError as error:
        if " error " not in str(error):
            raise
    try:
        assert_close(result.out, result.lse, result.expected, result.measure())
    except AssertionError as error:
        if " error " not in str(error):
            raise
        results = [result] + [_Result(replace(case, data=case.data + i)) for i in range(1, POOLED)]
        outs, lses = zip(*((r.out.double().cpu(), r.lse) for r in results), strict=True)
        together = lambda pairs: tuple(torch.stack(x) for x in zip(*pairs, strict=True))
        lse = None if lses[0] is None else torch.stack([x.cpu() for x in lses])
        expected, measure = together([r.expected for r in results]), together([r.measure() for r in results])
        assert_close(torch.stack(outs), lse, expected, measure)


class _Result:
    """What the call and the reference give."""

    def __init__(self, case: Case):
        self.case = case
        try:
            self.inputs = Inputs(case)
        except Exception as error:
            raise InvalidCaseError(f"{type(error).__name__}: {error}") from error
        found = self._run(case)
        self.out, self.lse = found if case.return_lse else (found, None)
        given = self.inputs.call.get("out")
        assert given is None or self.out is given, "the result is not `out`"
        try:
            self.expected = reference_decode(**self.inputs.reference, return_lse=True)
            if case.packed is not None:  # of the call that was asked for, beside the one that it must equal
                self.expected = tuple(map(self.inputs.pack, self.expected, (0.0, -torch.inf)))
                direct = reference_decode(**self.inputs.packed_reference, return_lse=True)
                torch.testing.assert_close(direct, self.expected, rtol=0, atol=1e-9, equal_nan=True)
        except Exception as error:
            raise InvalidCaseError(f"reference: {type(error).__name__}: {error}") from error

    def _run(self, case):
        call = dict(self.inputs.call)
        tensors = [call.pop(name, None) for name in ("query", "key", "value")]
        chunk, piece = (
            given if case.chunk is None else case.chunk for given in (eager.CHUNK_ELEMENTS, products.PIECE_ELEMENTS)
        )
        chunks = patch.object(eager, "CHUNK_ELEMENTS", chunk), patch.object(products, "PIECE_ELEMENTS", piece)
        with warnings.catch_warnings(), chunks[0], chunks[1]:
            warnings.simplefilter("ignore")  # numpy's remarks on lanes that the interpreter discards
            warnings.filterwarnings("error", message="flexdecode")
            try:
                return flex_decode(*tensors, options=DecodeOptions(backend=case.backend, **case.options), **call)
            except SharedMemoryError:  # the right answer to tiles that are too large for a GPU: take its own
                rest = {name: x for name, x in case.options.items() if name not in _TILES}
                if rest == case.options:
                    raise
                return flex_decode(*tensors, options=DecodeOptions(backend=case.backend, **rest), **call)

    def measure(self):
        measure = pytorch_decode(**self.inputs.reference)
        return measure if self.case.packed is None else tuple(map(self.inputs.pack, measure, (0.0, -torch.inf)))
