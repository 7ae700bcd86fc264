"""PyTorch's own list of elementwise operations: every one of them traces, in every spelling, or is named with a reason.

The list is `op_db` of PyTorch's tests: what it calls unary and binary functions, and the others that are elementwise.
Its sample inputs are captured element by element, so that the whole of a sample is compared with PyTorch at once.
"""

import math
from typing import NamedTuple

import pytest
import torch
from support import evaluate_graph, trace_mod
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import BinaryUfuncInfo, UnaryUfuncInfo

from flexdecode import UnsupportedOpError

# --- The list ---------------------------------------------------------------------------------------------------------

# Elementwise functions with real results that the list does not class as unary or binary.
OTHERS = {
    "addcdiv", "addcmul", "clamp", "clone", "contiguous", "full_like", "lerp", "logaddexp2", "masked_fill",
    "nn.functional.gelu", "nn.functional.hardswish", "nn.functional.leaky_relu", "ones_like", "resolve_conj",
    "resolve_neg", "where", "zeros_like",
}  # fmt: skip

EXCLUDED = {
    "a Bessel or Airy function": [
        "i0", "special.airy_ai", "special.bessel_j0", "special.bessel_j1", "special.bessel_y0", "special.bessel_y1",
        "special.i0e", "special.i1", "special.i1e", "special.modified_bessel_i0", "special.modified_bessel_i1",
        "special.modified_bessel_k0", "special.modified_bessel_k1", "special.scaled_modified_bessel_k0",
        "special.scaled_modified_bessel_k1", "special.spherical_bessel_j0",
    ],
    "of the family of the gamma function": [
        "digamma", "igamma", "igammac", "lgamma", "mvlgamma", "polygamma", "special.polygamma", "special.zeta",
    ],
    "an orthogonal polynomial, whose degree is a loop": [
        "special.chebyshev_polynomial_t", "special.chebyshev_polynomial_u", "special.chebyshev_polynomial_v",
        "special.chebyshev_polynomial_w", "special.hermite_polynomial_h", "special.hermite_polynomial_he",
        "special.laguerre_polynomial_l", "special.legendre_polynomial_p", "special.shifted_chebyshev_polynomial_t",
        "special.shifted_chebyshev_polynomial_u", "special.shifted_chebyshev_polynomial_v",
        "special.shifted_chebyshev_polynomial_w",
    ],
    "complex": ["cdouble", "cfloat", "chalf", "complex", "imag", "polar"],
    "two results": ["frexp"],
    "the user's own CUDA text": ["jiterator_binary", "jiterator_binary_return_by_ref", "jiterator_unary"],
}  # fmt: skip
REASONS = {name: reason for reason, names in EXCLUDED.items() for name in names}

LIST = [op for op in op_db if isinstance(op, (UnaryUfuncInfo, BinaryUfuncInfo)) or op.name in OTHERS]
COMPLEX_VARIANTS = [op for op in LIST if op.variant_test_name == "complex"]
SUPPORTED = [op for op in LIST if op.name not in REASONS and op not in COMPLEX_VARIANTS]
REFUSED = [op for op in LIST if op.name in REASONS and not op.name.startswith("jiterator")]


def label(op):
    return op.formatted_name


def callable_of(function):
    """A method of a C class cannot be called on a symbol otherwise than as a method."""
    if type(function).__name__ in ("method_descriptor", "wrapper_descriptor"):
        return lambda x, *args, **kwargs: getattr(x, function.__name__)(*args, **kwargs)
    return function


def function_of(op):
    return callable_of(op.op)


@pytest.mark.parametrize("op", REFUSED, ids=label)
def test_exceptions_are_refused(op):
    """One that works is to be struck out."""
    args = next(s for s in op.sample_inputs("cpu", torch.float32) if not s.kwargs).args
    operands = [0.5 if isinstance(x, torch.Tensor) else x for x in args]
    with pytest.raises(UnsupportedOpError):
        trace_mod(lambda s, b, h, q, k: function_of(op)(s, *(s if x == 0.5 else x for x in operands)))


def test_the_lists_name_what_pytorch_has():
    names = {op.name for op in LIST}
    assert not (set(REASONS) | OTHERS) - names


# --- Samples ----------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """Operands of one call: tensors `[n]`, one element for each key, and what is no tensor."""

    args: tuple
    kwargs: dict

    @property
    def length(self):
        return len(self.args[0])

    def element(self, kv_idx):
        """The operands at a position, for a mod."""
        shape = self.args[0].shape
        take = lambda x: x[kv_idx] if isinstance(x, torch.Tensor) and x.shape == shape else x
        return tuple(map(take, self.args)), {name: take(x) for name, x in self.kwargs.items()}

    def to(self, dtype):
        convert = lambda x: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        return Sample(tuple(map(convert, self.args)), {name: convert(x) for name, x in self.kwargs.items()})


def samples_of(op, dtype):
    """The samples of PyTorch's tests in which all tensors broadcast, as tensors of one dimension."""
    found = []
    for sample in op.sample_inputs("cpu", dtype):
        if op.name == "nn.functional.prelu":  # of several weights each is that of a channel
            sample.args, sample.kwargs = (torch.tensor([0.2]),), {}
        if op.name == "logit" and max((*sample.args, *sample.kwargs.values()), default=0) > 0.5:
            continue  # PyTorch has two results where the limits cross
        values = [sample.input, *sample.args, *sample.kwargs.values()]
        shape = torch.broadcast_shapes(*(x.shape for x in values if isinstance(x, torch.Tensor)))

        def spread(x):
            one_weight = op.name == "nn.functional.prelu" and x is not sample.input
            return x.detach().expand(shape).flatten() if isinstance(x, torch.Tensor) and not one_weight else x

        kwargs = {name: spread(x) for name, x in sample.kwargs.items() if name != "memory_format"}
        flat = Sample(tuple(map(spread, (sample.input, *sample.args))), kwargs)
        if 0 < math.prod(shape) <= 512 and not kwargs.get("training") and works(op.op, flat):
            found.append(flat)
    return found[:6]


def check(function, sample, convert=lambda x: x):
    """The graph of a function gives PyTorch's values in PyTorch's type."""
    dtypes = []

    def score_mod(score, b, h, q_idx, kv_idx):
        args, kwargs = sample.element(kv_idx)
        result = function(*map(convert, args), **{name: convert(x) for name, x in kwargs.items()})
        dtypes.append(result.dtype)
        return result.float()

    expected = function(*map(convert, sample.args), **{name: convert(x) for name, x in sample.kwargs.items()})
    graph, leaves = trace_mod(score_mod)
    zero = torch.tensor(0)
    actual = evaluate_graph(graph, leaves, torch.tensor(0.0), zero, zero, zero, torch.arange(sample.length))
    assert set(dtypes) == {expected.dtype}
    limits = {"rtol": 2.0**-9, "atol": 1e-5} if expected.dtype == torch.float16 else {}  # else those of PyTorch's tests
    torch.testing.assert_close(actual.expand(expected.shape), expected.float(), equal_nan=True, **limits)


def works(function, sample):
    """Whether PyTorch itself computes this."""
    try:
        return isinstance(function(*sample.args, **sample.kwargs), torch.Tensor)
    except (RuntimeError, TypeError, IndexError):
        return False


# --- Values and types -------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.int64, torch.uint8, torch.bool)


@pytest.mark.parametrize("op", SUPPORTED, ids=label)
def test_values_and_types_are_those_of_pytorch(op):
    for dtype in set(DTYPES) & set(op.dtypes):
        samples = samples_of(op, dtype)
        assert samples or dtype == torch.uint8  # which PyTorch may refuse for a negative parameter
        for sample in samples:
            check(function_of(op), sample)


# PyTorch rounds to float16 on the way, or counts steps of float16.
HALF_IS_ANOTHER = {"logit", "special.ndtr", "nextafter"}


@pytest.mark.parametrize(
    "op", [op for op in SUPPORTED if torch.float16 in op.dtypes and op.name not in HALF_IS_ANOTHER], ids=label
)
def test_half_types_are_rounded_once(op):
    """A captured tensor is read as float32, so the mod converts it."""
    convert = lambda x: x.half() if getattr(x, "dtype", None) == torch.float32 else x
    for sample in samples_of(op, torch.float16):
        check(function_of(op), sample.to(torch.float32), convert)


def spellings(op):
    """The function by all names that PyTorch has for it, with the name."""
    short = op.name.rpartition(".")[2]
    found = {"function": function_of(op), "method": op.method_variant}
    for alias in op.aliases:
        found |= {alias.name: alias.op, f"method {alias.name}": alias.method_variant}
    for space in (torch, torch.Tensor, torch.special, torch.nn.functional):
        found[f"{space.__name__}.{short}"] = getattr(space, short, None)
    for name in {short, f"special_{short}"}:
        packet = getattr(torch.ops.aten, name, None)
        if packet is not None:
            found |= {str(packet): packet, **{f"{packet}.{part}": getattr(packet, part) for part in packet.overloads()}}
    return {name: callable_of(function) for name, function in found.items() if function is not None}


@pytest.mark.parametrize("op", SUPPORTED, ids=label)
def test_every_spelling(op):
    """Function, method, twins in torch.special and torch.nn.functional, torch.ops.aten with and without an overload."""
    dtype = torch.float32 if torch.float32 in op.dtypes else torch.int64
    sample = samples_of(op, dtype)[-1]
    number = Sample((*sample.args[:1], 2), sample.kwargs)  # for an overload that takes a number
    tried = 0
    for function in spellings(op).values():
        for operands in (sample, number) if len(sample.args) == 2 else (sample,):
            if works(function, operands):
                check(function, operands)
                tried += 1
    assert tried >= 2
