"""PyTorch functions, methods, attributes and views on scores, indices and captured tensors.

Each mod runs through `flex_decode` and is compared with the reference, which calls the same mod on real tensors.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from support import POINTS, assert_close_to_reference, assert_same_as_pytorch, make_inputs, trace_mod

from flexdecode import TraceError, UnsupportedOpError, flex_decode
from flexdecode.frontend import handlers, torch_functions

B, Hq, N, Q = 2, 4, 19, 2
QUERY, KEY, VALUE = make_inputs(B, Hq, 2, Q, N, 16)
LENS = torch.tensor([N, 11])

generator = torch.Generator().manual_seed(7)
slopes = torch.rand(Hq, generator=generator) - 0.5
table = torch.randn(Hq, N, generator=generator)
bias = torch.randn(B, Hq, N, generator=generator)
one_row = torch.randn(1, N, generator=generator)
image = torch.randn(3, 4, 5, 6, generator=generator)
half = torch.randn(N, generator=generator).half()
byte = torch.randint(0, 255, (N,), generator=generator).to(torch.uint8)
order = torch.tensor([3, 1, 0, 2])
number = torch.tensor(0.7)
integer = torch.tensor(3)
flag = torch.tensor(True)


def check(score_mod=None, mask_mod=None):
    out, lse = flex_decode(QUERY, KEY, VALUE, score_mod, mask_mod, kv_lens=LENS, return_lse=True)
    assert_close_to_reference(out, lse, QUERY, KEY, VALUE, score_mod, mask_mod, kv_lens=LENS)


def check_same(score_mod, like):
    """Where the reference cannot run a mod: it does what `like` does, which the reference can."""
    out, lse = flex_decode(QUERY, KEY, VALUE, score_mod, kv_lens=LENS, return_lse=True)
    assert_close_to_reference(out, lse, QUERY, KEY, VALUE, like, kv_lens=LENS)


# --- Functions that are not rows of the table -------------------------------------------------------------------------

# By the name in the table of handlers: mods of a score and kv_idx that are the same on real 0-d tensors.
ELEMENTWISE = {
    "Tensor.where": [lambda s, k: s.where(k > 3, -1.0), lambda s, k: (k % 2).where(s > 0, s)],
    "add": [
        lambda s, k: torch.add(s, k, alpha=0.1),
        lambda s, k: s.add(other=k),
        lambda s, k: torch.add(input=s, other=1),
    ],
    "bool": [lambda s, k: torch.where((k % 2).bool(), s, 0.0)],
    "bfloat16": [lambda s, k: s.bfloat16()],
    "byte": [lambda s, k: k.byte() + s],
    "char": [lambda s, k: (k * 50).char() + s],
    "clamp": [
        lambda s, k: s.clamp(-0.5, 0.5),
        lambda s, k: torch.clamp(s, min=-0.5),
        lambda s, k: torch.clamp(input=s, max=k),
        lambda s, k: k.clamp(min=3.5),
        lambda s, k: k.clamp(2, 7).float(),
        lambda s, k: torch.clamp(s, 2.0, 1.0),
    ],
    "clamp_max": [lambda s, k: s.clamp_max(0.5), lambda s, k: torch.clamp_max(s, max=0.5)],
    "clamp_min": [lambda s, k: s.clamp_min(0.5)],
    "clip": [lambda s, k: torch.clip(s, -1, 1), lambda s, k: s.clip(max=0.1)],
    "div": [
        lambda s, k: torch.div(s, 0.3),
        lambda s, k: torch.div(s, other=3),
        lambda s, k: torch.div(s, 0.3, rounding_mode="floor"),
        lambda s, k: torch.div(s, 0.3, rounding_mode="trunc"),
        lambda s, k: torch.div(k - 9, 4, rounding_mode="floor").float(),
        lambda s, k: s + torch.div(k - 9, 4, rounding_mode="trunc"),
        lambda s, k: torch.div((k + 2**40) * 2**20 + 1, 3, rounding_mode="trunc") % 1000,
    ],
    "divide": [lambda s, k: s.divide(3)],
    "double": [lambda s, k: (s.double() * 3).float()],
    "elu": [lambda s, k: F.elu(s), lambda s, k: F.elu(s, alpha=0.5)],
    "float": [lambda s, k: k.float()],
    "float_power": [
        lambda s, k: torch.float_power(k, 2).float(),
        lambda s, k: s.abs().float_power(exponent=0.5).float(),
    ],
    "frac": [lambda s, k: torch.frac(s), lambda s, k: s.frac()],
    "full_like": [lambda s, k: s + torch.full_like(s, 3), lambda s, k: torch.full_like(k, 2.5) + s],
    "gelu": [lambda s, k: F.gelu(s), lambda s, k: F.gelu(s, approximate="tanh")],
    "half": [lambda s, k: s.half().float()],
    "hardtanh": [lambda s, k: F.hardtanh(s), lambda s, k: F.hardtanh(s, -2, 0.5)],
    "int": [lambda s, k: (s.clamp(-9, 9) * 5).int() + s],
    "is_floating_point": [lambda s, k: s if s.is_floating_point() and not torch.is_floating_point(k) else -s],
    "leaky_relu": [lambda s, k: F.leaky_relu(s), lambda s, k: F.leaky_relu(s, negative_slope=0.2)],
    "log_sigmoid": [lambda s, k: F.logsigmoid(s)],
    "logsigmoid": [lambda s, k: F.logsigmoid(s)],
    "max": [lambda s, k: torch.max(s, k), lambda s, k: s.max(other=k.float()), lambda s, k: k.max(k - 2) + s],
    "min": [lambda s, k: torch.min(s, k), lambda s, k: torch.min(s, other=-s)],
    "long": [lambda s, k: (s.clamp(-9, 9) * 5).long() + s],
    "masked_fill": [
        lambda s, k: s.masked_fill(k > 3, -1e9),
        lambda s, k: torch.masked_fill(s, mask=k > 3, value=-torch.inf),
        lambda s, k: k.masked_fill(k > 3, 2.0) + s,
    ],
    "new_full": [lambda s, k: s + k.new_full((), 5), lambda s, k: s + s.new_full((), 0.5, dtype=torch.int32)],
    "new_ones": [
        lambda s, k: s + k.new_ones(()),
        lambda s, k: s + s.new_ones(1)[0],
        lambda s, k: s + s.new_ones((2, 3))[1, 2],
    ],
    "new_tensor": [lambda s, k: s + s.new_tensor(2.5), lambda s, k: s + k.new_tensor(2.5)],
    "new_zeros": [lambda s, k: s + s.new_zeros(()), lambda s, k: s + k.new_zeros(size=(), dtype=torch.bool)],
    "ones_like": [lambda s, k: s + torch.ones_like(k), lambda s, k: torch.ones_like(s, dtype=torch.int8) + s],
    "pos": [lambda s, k: +s],
    "positive": [lambda s, k: torch.positive(s)],
    "relu": [lambda s, k: F.relu(s), lambda s, k: s.relu(), lambda s, k: torch.relu(k - 4) + s],
    "relu6": [lambda s, k: F.relu6(s)],
    "result_type": [lambda s, k: s.to(torch.result_type(s, k)), lambda s, k: k.to(torch.result_type(k, 1.5))],
    "round": [
        lambda s, k: torch.round(s),
        lambda s, k: torch.round(s, decimals=1),
        lambda s, k: s.round(decimals=-1),
        lambda s, k: torch.round(k + 0.5),
    ],
    "rsub": [
        lambda s, k: torch.rsub(s, 1.0),
        lambda s, k: torch.rsub(s, k, alpha=2),
        lambda s, k: torch.rsub(s, other=k),
    ],
    "short": [lambda s, k: (k * 9999).short() + s],
    "silu": [lambda s, k: F.silu(s)],
    "softplus": [lambda s, k: F.softplus(s), lambda s, k: F.softplus(s, beta=2.0, threshold=3)],
    "square": [lambda s, k: torch.square(s), lambda s, k: k.square() + s],
    "sub": [lambda s, k: torch.sub(s, k), lambda s, k: s.sub(k, alpha=0.5)],
    "subtract": [lambda s, k: s.subtract(k)],
    "to": [
        lambda s, k: k.to(torch.float32),
        lambda s, k: k.to(s.dtype),
        lambda s, k: k.to(s),
        lambda s, k: k.to(dtype=torch.float32),
        lambda s, k: k.to(s.device, torch.float32),
        lambda s, k: s + k.to("cpu"),
        lambda s, k: (k * 50).to(torch.int8) + s,
    ],
    "true_divide": [lambda s, k: torch.true_divide(k, 3)],
    "type": [lambda s, k: k.type(torch.float32)],
    "type_as": [lambda s, k: k.type_as(s)],
    "where": [
        lambda s, k: torch.where(k > 3, s, 0.0),
        lambda s, k: torch.where(condition=k > 3, input=s, other=k),
        lambda s, k: torch.where(k > 3, 1, 0) + s,
        lambda s, k: torch.where(k > 3, -torch.inf, s),
    ],
    "zeros_like": [lambda s, k: s + torch.zeros_like(k), lambda s, k: torch.zeros_like(s) + k],
    # Factories and attributes.
    "as_tensor": [lambda s, k: s + torch.as_tensor(0.5), lambda s, k: torch.as_tensor(s) * 2],
    "asarray": [lambda s, k: s + torch.asarray(2.0)],
    "full": [lambda s, k: s + torch.full((), 0.5), lambda s, k: s + torch.full(size=(2,), fill_value=2)[1]],
    "ones": [
        lambda s, k: s + torch.ones(()),
        lambda s, k: s + torch.ones(3)[0],
        lambda s, k: s + torch.ones(2, 3)[1, 2],
    ],
    "scalar_tensor": [lambda s, k: s + torch.scalar_tensor(2.0)],
    "tensor": [
        lambda s, k: s + torch.tensor(0.5),
        lambda s, k: s + torch.tensor(data=2, device=s.device),
        lambda s, k: s + torch.tensor(1.7, dtype=torch.int64),
        lambda s, k: torch.maximum(s, torch.tensor(0.0)),
        lambda s, k: torch.where(torch.tensor(True), s, 0.0),
    ],
    "zeros": [
        lambda s, k: s + torch.zeros(()),
        lambda s, k: s + torch.zeros([]),
        lambda s, k: s + torch.zeros(size=(3,))[1],
    ],
    "arange": [
        lambda s, k: s + torch.arange(900)[k],
        lambda s, k: s + torch.arange(1, 2000, 2)[k],
        lambda s, k: s + torch.arange(start=0, end=900, dtype=torch.int32)[k],
    ],
    "dim": [lambda s, k: s + s.dim()],
    "ndim": [lambda s, k: s + s.ndim],
    "ndimension": [lambda s, k: s + k.ndimension()],
    "shape": [lambda s, k: s + len(s.shape)],
    "size": [lambda s, k: s + len(k.size())],
    "numel": [lambda s, k: s + s.numel()],
    "nelement": [lambda s, k: s + k.nelement()],
    "t": [lambda s, k: s.t()],
    "detach": [lambda s, k: s.detach()],
    "clone": [lambda s, k: s.clone()],
    "contiguous": [lambda s, k: s.contiguous()],
    "cpu": [lambda s, k: k.cpu() + s],
    "squeeze": [lambda s, k: s.squeeze()],
    "getitem": [lambda s, k: s[()], lambda s, k: s[...], lambda s, k: s[None][0]],
}

# By name: mods that also read captured tensors.
ON_TENSORS = {
    "broadcast_to": [lambda s, b, h, q, k: s + torch.broadcast_to(one_row, (4, N))[h, k]],
    "clone": [lambda s, b, h, q, k: s + table.T.clone().detach().contiguous()[k, h]],
    "data": [lambda s, b, h, q, k: s + table.data[h, k]],
    "expand": [
        lambda s, b, h, q, k: s + one_row.expand(4, -1)[h, k],
        lambda s, b, h, q, k: s + one_row.expand((2, 4, N))[b, h, k],
        lambda s, b, h, q, k: s + one_row[:, :1].expand(Hq, 5)[h, k],
    ],
    "expand_as": [lambda s, b, h, q, k: s + one_row.expand_as(table)[h, k]],
    "full_like": [lambda s, b, h, q, k: s + torch.full_like(slopes, 2)[h] + torch.full_like(slopes, 2)[k]],
    "getitem": [
        lambda s, b, h, q, k: s + bias[b, h, k],
        lambda s, b, h, q, k: s + bias[b][h][k],
        lambda s, b, h, q, k: s + bias[b, h][k],
        lambda s, b, h, q, k: s + bias[(b, h, k)],
        lambda s, b, h, q, k: s + bias[-1, -h - 1, k - N],
        lambda s, b, h, q, k: s + slopes[2] + slopes[-1] + slopes[9] + slopes[-9],
        lambda s, b, h, q, k: s + slopes[k] + slopes[k - 9] + table[k, -k],
        lambda s, b, h, q, k: s + bias[..., k][b, h] + bias[b, ..., 3][h] + bias[...][b, h, k],
        lambda s, b, h, q, k: s + slopes[None][0, h] + slopes[:, None][h, 0] + slopes[None, :, None][0, h][0],
        lambda s, b, h, q, k: s + image[b, :, k % 5][h, q % 6] + image[:, h, :, k % 6][b, q % 5],
        lambda s, b, h, q, k: s + table[h.int(), k.to(torch.int16)] + table[byte[k] % 4, k],
        lambda s, b, h, q, k: s + slopes[integer] + slopes[torch.tensor(2)],
    ],
    "ones_like": [lambda s, b, h, q, k: s + torch.ones_like(slopes)[k]],
    "mT": [lambda s, b, h, q, k: s + bias.mT[b, k, h]],
    "narrow": [lambda s, b, h, q, k: s + slopes.narrow(0, 1, 3)[h - 1] + table.narrow(dim=1, start=3, length=9)[h, k]],
    "numel": [lambda s, b, h, q, k: s + table.numel() * 0.01],
    "permute": [
        lambda s, b, h, q, k: s + bias.permute(2, 0, 1)[k, b, h] + bias.permute((1, 2, 0))[h, k, b],
        lambda s, b, h, q, k: (
            s + torch.permute(bias, (1, -1, 0))[h, k, b] + image.permute(dims=(1, 2, 0, 3))[h, k % 5, b, 2]
        ),
    ],
    "select": [lambda s, b, h, q, k: s + table.select(0, 1)[k] + table.select(1, -1)[h] + torch.select(table, 0, 2)[k]],
    "shape": [lambda s, b, h, q, k: s + table[h % table.shape[0], (2 * k) % table.shape[1]]],
    "size": [lambda s, b, h, q, k: s + table[h, (k * 2) % table.size(1)] / table.size(-1) + len(table.size())],
    "squeeze": [
        lambda s, b, h, q, k: s + one_row.squeeze()[k] + one_row.squeeze(0)[k] + table.squeeze()[h, k],
        lambda s, b, h, q, k: s + one_row[:, :, None].squeeze((0, 2))[k] + table.squeeze((0, -1))[h, k],
    ],
    "swapaxes": [lambda s, b, h, q, k: s + table.swapaxes(0, 1)[k, h]],
    "swapdims": [lambda s, b, h, q, k: s + bias.swapdims(0, 2)[k, h, b]],
    "t": [lambda s, b, h, q, k: s + table.t()[k, h] + slopes.t()[h]],
    "T": [lambda s, b, h, q, k: s + table.T[k, h] + table[:2].T[k, b]],
    "to": [lambda s, b, h, q, k: s + half.to(torch.float32)[k] * 0.1 + slopes.to(s.device)[h] + byte.to(s)[k]],
    "transpose": [
        lambda s, b, h, q, k: s + bias.transpose(0, 2)[k, h, b] + torch.transpose(bias, -1, -2)[b, k, h],
        lambda s, b, h, q, k: s + table.transpose(dim0=0, dim1=1)[k, h],
    ],
    "unsqueeze": [
        lambda s, b, h, q, k: (
            s + slopes.unsqueeze(0)[0, h] + slopes.unsqueeze(-1)[h][0] + slopes.unsqueeze(dim=1)[h, 0]
        ),
        lambda s, b, h, q, k: s + table.unsqueeze(1)[h, k, b],
    ],
    "zeros": [lambda s, b, h, q, k: s + torch.zeros(table.shape)[h, k] + torch.zeros(table.size(0))[h]],
    "zeros_like": [lambda s, b, h, q, k: s + torch.zeros_like(table)[h, k]],
    "Tensor.where": [lambda s, b, h, q, k: s + table.where(table > 0, -0.5)[h, k]],
    "embedding": [lambda s, b, h, q, k: s + F.embedding(k % 5, image[0, 0])[h]],
    "len": [lambda s, b, h, q, k: s + slopes[h % len(slopes)]],
    "tensor": [lambda s, b, h, q, k: s + torch.tensor([1.0, 2.0, 3.0, 4.0])[h] + torch.tensor([[1], [2]])[b, 0]],
}

# Elementwise functions that test_op_db.py runs on PyTorch's own samples, in every spelling.
IN_OP_DB = {
    "addcdiv", "addcmul", "angle", "celu", "conj", "conj_physical", "deg2rad", "fill", "fmax", "fmin", "hardshrink",
    "hardsigmoid", "hardswish", "heaviside", "isclose", "isreal", "ldexp", "lerp", "logit", "mish", "nan_to_num",
    "nextafter", "prelu", "rad2deg", "real", "resolve_conj", "resolve_neg", "rrelu", "selu", "softshrink", "softsign",
    "tanhshrink", "threshold", "_threshold", "_to_copy",
}  # fmt: skip

READS = {"item", "tolist", "numpy", "__array__", "__bool__", "__complex__", "__contains__", "__float__", "__format__",
         "__index__", "__int__", "__repr__"}  # fmt: skip
ELSEWHERE = {  # in test_reductions and test_views
    "__iter__", "all", "amax", "amin", "any", "argmax", "argmin", "bmm", "bucketize", "cat", "chunk", "concat",
    "concatenate", "count_nonzero", "dot", "flatten", "gather", "index_select", "inner", "isin", "linalg_norm",
    "linalg_vecdot", "linalg_vector_norm", "logsumexp", "matmul", "mean", "mm", "mv", "norm", "prod", "ravel",
    "reshape", "reshape_as", "searchsorted", "split", "split_with_sizes", "stack", "std", "sum", "take",
    "take_along_dim", "unbind", "unflatten", "var", "vdot", "view", "view_as",
}  # fmt: skip
UNREACHED = {"alias", "cuda"}  # no method of that name, and no GPU


def test_every_handler_is_tested_here():
    """A new handler needs a case in one of the tables above."""
    tested = {*ELEMENTWISE, *ON_TENSORS, *IN_OP_DB, *READS, *UNREACHED, *ELSEWHERE}
    assert tested == set(torch_functions.HANDLERS)


@pytest.fixture
def called(monkeypatch):
    """Names under which calls were dispatched."""
    names = set()
    name_of = torch_functions._name_of

    def record(func):
        names.add(name_of(func))
        return name_of(func)

    monkeypatch.setattr(torch_functions, "_name_of", record)
    return names


DIRECT = {"getitem", "ndim", "shape", "pos", "logsigmoid"}  # not dispatched, or under another name


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise(name, called):
    """Bit by bit on 0-d tensors, and through the whole call."""
    # The smooth functions compute something equal, not the same.
    smooth = name in ("elu", "gelu", "silu", "softplus", "logsigmoid", "log_sigmoid", "erfc", "frac", "round")
    points = POINTS[:5] if name in ("byte", "erfc", "gelu", "softplus") else POINTS
    for mod in ELEMENTWISE[name]:
        assert_same_as_pytorch(lambda s, b, h, q, k, mod=mod: mod(s, k).float(), points, 2e-5 if smooth else 2e-7)
    assert name in called or name in DIRECT
    for mod in ELEMENTWISE[name]:
        if name not in ("half", "bfloat16"):  # roundings of numbers that differ by an ulp differ by much more
            check(lambda s, b, h, q, k, mod=mod: s * 0.5 + 0.01 * mod(s, k).float())


@pytest.mark.parametrize("name", ON_TENSORS)
def test_on_captured_tensors(name, called):
    for mod in ON_TENSORS[name]:
        check(mod)
    assert name in called


MODULES = [
    torch.nn.ReLU(), torch.nn.SiLU(), torch.nn.GELU(), torch.nn.GELU("tanh"), torch.nn.Softplus(beta=2.0, threshold=3),
    torch.nn.LogSigmoid(), torch.nn.Identity(), torch.nn.Tanh(), torch.nn.Sigmoid(), torch.nn.Hardtanh(),
    torch.nn.ELU(0.5), torch.nn.LeakyReLU(0.2), torch.nn.ReLU6(), torch.nn.Sequential(torch.nn.Tanh(), torch.nn.SiLU()),
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_activation_modules(module):
    check(lambda s, b, h, q, k: module(s))


# --- Lazy values: nothing is read while tracing -----------------------------------------------------------------------

LAZY = {
    "unary": lambda s, b, h, q, k: s + slopes.exp()[h] + (-slopes)[h] + torch.sigmoid(table)[h][k],
    "scalar": lambda s, b, h, q, k: s + (table * 2 + 1)[h, k] + (2**-slopes)[h] + (1 / table)[h, k].clamp(-3, 3),
    "comparison": lambda s, b, h, q, k: torch.where((table > 0)[h, k], s, -1.0),
    "where": lambda s, b, h, q, k: s + torch.where(table > 0, table, 0.0)[h, k] + table.clamp(min=0)[h, k],
    "broadcast": lambda s, b, h, q, k: s + (table + slopes[:, None])[h, k] + (one_row + slopes.unsqueeze(1))[h, k],
    "three_dimensions": lambda s, b, h, q, k: s + (bias + table)[b, h, k] + (bias * slopes[None, :, None])[b, h, k],
    "with_a_symbol": lambda s, b, h, q, k: (s + slopes)[h] + (slopes[h] * table)[h, k] + (slopes * k)[h] * 0.01,
    "slice": lambda s, b, h, q, k: s + slopes[1:][h] + slopes[1:3][h - 1] + slopes[-3:-1][h % 2] + slopes[1:][-h - 1],
    "slice_step": lambda s, b, h, q, k: (
        s + table[h, ::2][k // 2] + table[:, 5::7][h, k % 9] + table[:, 5::7][h, -1 - k % 9]
    ),
    "slices": lambda s, b, h, q, k: s + bias[:, 1:, 3:][b, h - 1, k] + table[1:3, 2:10:3][h % 2, k % 3],
    "slice_outside": lambda s, b, h, q, k: s + table[:, 16:99][h, k % 7] + table[:, -99:3][h, k] + table[:, 10:5][h, k],
    "slice_of_slice": lambda s, b, h, q, k: s + table[h][1:][2:][k - 3] + table[h][-5:][k % 5] + table[h][:-9][k % 7],
    "reflected": lambda s, b, h, q, k: s + (1.5 - slopes)[h] + (5 // (slopes * 10 + 9))[h] + (5 % (slopes + 3))[h],
    "cast": lambda s, b, h, q, k: s + half.float()[k] + byte.long()[k] * 0.01 + slopes.half()[h],
    "views_of_values": lambda s, b, h, q, k: (
        s + (1 + table.T)[k, h] + table.exp().T[k, h] + (bias * 2).permute(2, 0, 1)[k, b, h]
    ),
}


@pytest.mark.parametrize("mod", LAZY.values(), ids=LAZY)
def test_lazy_values(mod):
    check(mod)


OUTSIDE = {
    "computed": lambda s, b, h, q, k: s + slopes.exp()[k] + slopes.cos()[k - 9] + (slopes + 1)[k],
    "two_tensors": lambda s, b, h, q, k: s + (table + slopes[:, None])[k, k],
    "filled": lambda s, b, h, q, k: s + torch.full((4,), 2.0)[k] + torch.ones(3)[k - 9],
    "expanded": lambda s, b, h, q, k: s + one_row[:, :1].expand(4, 9)[h, k] + one_row.expand(2, N)[h, k],
    "unsqueezed": lambda s, b, h, q, k: s + slopes.unsqueeze(0)[b, h] + table[:, None][h, b, k],
    "transposed": lambda s, b, h, q, k: s + (table + 1).T[k, h + 1],
    "view_of_view": lambda s, b, h, q, k: s + (slopes.exp().unsqueeze(1).expand(4, 5)[1:, 2:])[h, k],
    "nested": lambda s, b, h, q, k: s + slopes[byte[k].long() % 6] + table[h, half[k].long() * 99],
}


@pytest.mark.parametrize("mod", OUTSIDE.values(), ids=OUTSIDE)
def test_a_read_outside_gives_zero(mod):
    """Of what the mod indexes: not the value that an operation makes of an outside zero."""
    check(mod)


def test_zero_preserving_operations_need_no_second_check():
    """The bounds check of the load is enough where an operation keeps zero."""
    for function in (lambda x: x.double(), lambda x: -x * 2, lambda x: x.abs().detach(), lambda x: x.clamp(min=0)):
        assert "where" not in trace_mod(lambda s, b, h, q, k, f=function: s + f(half.float())[k])[0].text
    for function in (lambda x: x.exp(), lambda x: x + 1, lambda x: 1 / x):
        assert "where" in trace_mod(lambda s, b, h, q, k, f=function: s + f(bias)[b, h, k])[0].text


def test_an_index_table():
    check_same(lambda s, b, h, q, k: s + table[order][h, k], lambda s, b, h, q, k: s + table[order[h], k])
    check_same(lambda s, b, h, q, k: s + table[:, order][h, k % 4], lambda s, b, h, q, k: s + table[h, order[k % 4]])
    check_same(
        lambda s, b, h, q, k: s + image[b, :, order][h, k % 4, q % 6],
        lambda s, b, h, q, k: s + image[b, h, order[k % 4], q % 6],
    )


def test_sizes_are_numbers():
    _, M = table.shape
    check(lambda s, b, h, q, k: s + (lambda H, M: table[h % H, k % M] + H)(*table.shape))
    check(lambda s, b, h, q, k: s + sum(slopes[i] for i in range(slopes.shape[0])))
    check(lambda s, b, h, q, k: s if table.shape == (Hq, N) and table.ndim == 2 and M > 3 else s * 2)
    check(lambda s, b, h, q, k: s * table.size()[1] / math.prod(table.shape))


def test_types_and_devices_are_pytorchs():
    check(lambda s, b, h, q, k: torch.where(k <= q, s, torch.finfo(s.dtype).min))
    check(lambda s, b, h, q, k: torch.where(k < torch.iinfo(k.dtype).max, s, 0.0))
    check(lambda s, b, h, q, k: s if s.device.type == "cpu" and not s.is_cuda and s.is_cpu else -s)
    check(lambda s, b, h, q, k: s if (k.dtype, half.dtype) == (torch.int64, torch.float16) else -s)
    check(lambda s, b, h, q, k: s if half.float().dtype == torch.float32 else -s)
    check(lambda s, b, h, q, k: s if not s.requires_grad and s.layout == torch.strided and s.itemsize == 4 else -s)
    check(lambda s, b, h, q, k: s.real + torch.zeros((), dtype=s.dtype, device=s.device))
    check(lambda s, b, h, q, k: s if half.is_cpu and half.layout == torch.strided and not half.is_sparse else -s)


def test_transposing_a_tensor_of_many_dimensions_reverses_them():
    expected = image.permute(3, 2, 1, 0)
    check_same(
        lambda s, b, h, q, k: s + image.T[k % 6, q % 5, h, b], lambda s, b, h, q, k: s + expected[k % 6, q % 5, h, b]
    )


# --- Refusals ---------------------------------------------------------------------------------------------------------


def refused(mod, kind, message):
    with pytest.raises(kind, match=message) as caught:
        trace_mod(mod)
    _, line, remedy = str(caught.value).split("\n")
    assert line.startswith(f"  {__file__}:")
    return remedy.strip()


@pytest.mark.parametrize(
    "name, mod",
    [
        ("cumsum", lambda s, b, h, q, k: s + table.cumsum(0)[h, k]),
        ("softmax", lambda s, b, h, q, k: torch.softmax(table[h], -1)[0] + s),
        ("empty", lambda s, b, h, q, k: s + torch.empty(4)[h]),
        ("equal", lambda s, b, h, q, k: s if torch.equal(table, table) else -s),
        (r"rrelu\(training=True\)", lambda s, b, h, q, k: F.rrelu(s, training=True)),
        ("prelu with a weight for each channel", lambda s, b, h, q, k: F.prelu(s, slopes)),
        ("nextafter of torch.bfloat16", lambda s, b, h, q, k: torch.nextafter(s.bfloat16(), s)),
        (r"Tensor\.to\(torch.complex64\)", lambda s, b, h, q, k: s.to(torch.complex64).real),
        (r"Tensor\.grad_fn", lambda s, b, h, q, k: s if s.grad_fn is None else -s),
        (r"div\(rounding_mode='up'\)", lambda s, b, h, q, k: torch.div(s, 2, rounding_mode="up")),
        ("where with one operand", lambda s, b, h, q, k: torch.where(k > 3)),
    ],
)
def test_unsupported_operations(name, mod):
    remedy = refused(mod, UnsupportedOpError, rf"^torch\.{name} is not supported in score_mod\n")
    assert remedy == REMEDY


REMEDY = (
    "Write it with supported operations (the page Operations of the docs lists them), or compute it outside the "
    "mod and capture the result as a tensor."
)


@pytest.mark.parametrize("mod", [
    lambda s, b, h, q, k: torch.unsqueeze_copy(s, 0)[0],
    lambda s, b, h, q, k: torch.addr(s, s, s),
    lambda s, b, h, q, k: s + torch.sort(table).values[h, k],
])  # fmt: skip
def test_an_operation_of_pytorch_is_no_misspelling_of_another(mod):
    assert refused(mod, UnsupportedOpError, "is not supported in score_mod") == REMEDY


@pytest.mark.parametrize("mod", [
    lambda s, b, h, q, k: s + torch.rand(()),
    lambda s, b, h, q, k: s + torch.rand(2, 3),
    lambda s, b, h, q, k: s + torch.randn(4)[h],
    lambda s, b, h, q, k: torch.rand_like(s),
    lambda s, b, h, q, k: F.dropout(s),
    lambda s, b, h, q, k: torch.bernoulli(s),
])  # fmt: skip
def test_random_numbers(mod):
    remedy = refused(mod, UnsupportedOpError, "is not supported in score_mod")
    assert remedy == "A mod has no random numbers: draw them outside the mod, and capture them as a tensor."


@pytest.mark.parametrize("name", ["torch.special.zeta", "torch.linalg.det"])
def test_a_function_is_named_as_a_user_writes_it(name):
    function = eval(name)
    mod = lambda s, b, h, q, k: function(s, s) if "zeta" in name else function(s)
    remedy = refused(mod, UnsupportedOpError, f"^{name} is not supported in score_mod")
    assert remedy == REMEDY


def test_a_method_that_does_not_exist_names_the_nearest():
    message = (
        "AttributeError: 'Tensor' object has no attribute 'clampmin', the nearest supported name is `torch.clamp_min`"
    )
    with pytest.raises(TraceError, match=message):
        trace_mod(lambda s, b, h, q, k: s.clampmin(0))
    trace_mod(lambda s, b, h, q, k: None if hasattr(s, "clampmin") else s)


def test_the_nearest_operation_is_written_as_a_user_writes_it():
    near = {
        "heavyside": "torch.heaviside", "clampmin": "torch.clamp_min", "atan3": "torch.atan",
        "entro": "torch.special.entr", "hardswishh": "torch.nn.functional.hardswish", "type_is": "torch.Tensor.type_as",
        "foo": None, "maxx": "torch.max", "rand": None, "cumsum": None, "item": None, "numpy": None,
    }  # fmt: skip
    assert {name: handlers.nearest(name) for name in near} == near


READING = {
    "item": lambda s, b, h, q, k: s * slopes[h].item(),
    "item_0d": lambda s, b, h, q, k: s * number.item(),
    "tolist": lambda s, b, h, q, k: s * slopes.tolist()[0],
    "numpy": lambda s, b, h, q, k: s * slopes.numpy()[0],
    "float": lambda s, b, h, q, k: s * float(number),
    "int": lambda s, b, h, q, k: s * int(integer),
    "complex": lambda s, b, h, q, k: s * complex(number).real,
    "bool": lambda s, b, h, q, k: s if flag else -s,
    "index": lambda s, b, h, q, k: s * [1, 2, 3, 4][integer],
    "range": lambda s, b, h, q, k: s * len(range(integer)),
    "math": lambda s, b, h, q, k: s * math.sqrt(number),
    "format": lambda s, b, h, q, k: s * float(f"{number}"),
    "repr": lambda s, b, h, q, k: s * len(repr(slopes)),
    "contains": lambda s, b, h, q, k: s if 0.5 in slopes else -s,
}


@pytest.mark.parametrize("mod", READING.values(), ids=READING)
def test_values_of_captured_tensors_are_not_read(mod):
    """They would be frozen in the kernel."""
    remedy = refused(mod, TraceError, "the value of a tensor was read in a score_mod")
    assert remedy.startswith("Use the tensor itself, and torch.where for `if`: it is read afresh at every call.")


def in_place(statement):
    def mod(s, b, h, q, k):
        statement(s)
        return s

    return mod


def add_to_table(s):
    local = table
    local += 1


WRITING = {
    "method": lambda s: s.add_(1),
    "captured": lambda s: table.mul_(2),
    "setitem": lambda s: table.__setitem__((0, 0), 1.0),
    "setitem_symbol": lambda s: s.__setitem__((), 1.0),
    "augmented": add_to_table,
    "out": lambda s: torch.add(s, 1, out=table),
    "inplace": lambda s: F.relu(s, inplace=True),
    "module": lambda s: torch.nn.ReLU(inplace=True)(s),
}


@pytest.mark.parametrize("statement", WRITING.values(), ids=WRITING)
def test_writes(statement):
    before = table.clone()
    remedy = refused(in_place(statement), UnsupportedOpError, "writes in place, which a score_mod must not do")
    assert remedy.startswith("Use the operation that returns a new value")
    assert torch.equal(table, before)


def test_augmented_assignment_of_the_score_makes_a_new_value():
    def mod(s, b, h, q, k):
        s *= 0.5
        s += table[h, k]
        return s

    check(mod)


INDICES = {
    "a list": lambda s, b, h, q, k: s + table[[h, k]],
    "a tuple": lambda s, b, h, q, k: s + table[h, (k,)],
    "a str": lambda s, b, h, q, k: s + table[h, "a"],
    "a bool": lambda s, b, h, q, k: s + table[True],
    "a float": lambda s, b, h, q, k: s + table[h, 1.5],
    "torch.float32": lambda s, b, h, q, k: s + table[h, s],
    "torch.bool": lambda s, b, h, q, k: s + table[h, k < q],
    "two index tensors that have dimensions": lambda s, b, h, q, k: s + table[order, order][h],
}


@pytest.mark.parametrize("what", INDICES)
def test_bad_indices(what):
    remedy = refused(INDICES[what], TraceError, f"a captured tensor was indexed with {what} in a score_mod")
    assert remedy.startswith("Index with integers: b, h, q_idx, kv_idx, arithmetic on them")


@pytest.mark.parametrize(
    "mod, message",
    [
        (lambda s, b, h, q, k: s + table[h, k, b], "too many indices in a score_mod: 3 for a tensor of 2"),
        (lambda s, b, h, q, k: s[0], "too many indices in a score_mod: 1 for a tensor of 0"),
        (lambda s, b, h, q, k: s + table[h, ::-1][k], "a slice step must be positive"),
        (lambda s, b, h, q, k: s + table.expand(4, 5)[h, k], r"The expanded size of the tensor \(5\) must match"),
        (lambda s, b, h, q, k: s + table.permute(0, 0)[h, k], r"permute\(0, 0\) of a tensor of rank 2"),
        (lambda s, b, h, q, k: s + table.transpose(0, 5)[h, k], "dimension 5 is out of range for rank 2"),
        (lambda s, b, h, q, k: s + slopes.mT[h], "dimension -2 is out of range for rank 1"),
        (lambda s, b, h, q, k: s + (table + torch.zeros(3))[h, k], "Attempting to broadcast a dimension of length 3"),
        (lambda s, b, h, q, k: torch.clamp(s), "clamp needs `min` or `max`"),
        (lambda s, b, h, q, k: torch.tensor([s, s])[0], "a list of traced values became a tensor"),
    ],
)  # fmt: skip
def test_bad_shapes_and_arguments(mod, message):
    refused(mod, TraceError, f"^{message}")


def test_wrong_arguments_are_pytorchs_own_errors():
    for mod in (lambda s, b, h, q, k: torch.exp(s, foo=1), lambda s, b, h, q, k: torch.maximum(s)):
        refused(mod, TraceError, "^score_mod raised TypeError: ")


def test_setting_an_attribute():
    def mod(s, b, h, q, k):
        s.data = 3.0
        return s

    refused(mod, TraceError, "score_mod raised AttributeError: 'Tensor' object has no attribute 'data'")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16, torch.float8_e4m3fnuz])
def test_unsupported_dtypes(dtype):
    captured = torch.zeros(4, dtype=dtype)
    remedy = refused(
        lambda s, b, h, q, k: s + captured[h], UnsupportedOpError, f"a captured tensor of {dtype} cannot be read"
    )
    assert remedy == "Convert it outside the mod, e.g. with .float() or .long()."
