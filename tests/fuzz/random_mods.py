"""Random mods as text, with what they capture.

Numbers of a mod are compared with the reference in float64, so nothing here has a step at a rounded value: comparisons,
`//`, `%` and rounding are of integers.
"""

import sys
from dataclasses import dataclass, field
from random import Random

import torch

from flexdecode.frontend.ops import OPS

from .case import Captured

INTEGERS = ("int64", "int32", "int16", "int8", "uint8")
FLOATS = ("float32", "float32", "float16", "bfloat16", "float64", "float8_e4m3fn", "float8_e5m2")
LAYOUTS = ("contiguous", "contiguous", "transposed", "strided", "expanded")
HUGE = (sys.maxsize, 2**40, 2**62, -(2**62), 2**31, 2**31 - 1)

# Of a function of a real number not named here only values between 0.1 and 0.9 are asked.
DOMAINS = {
    "exp": "({}).clamp(-4, 4)", "exp2": "({}).clamp(-4, 4)", "expm1": "({}).clamp(-4, 4)", "log": "(({}).abs() + 0.5)",
    "log2": "(({}).abs() + 0.5)", "log10": "(({}).abs() + 0.5)", "log1p": "({}).abs()", "sqrt": "(({}).abs() + 0.1)",
    "rsqrt": "(({}).abs() + 0.5)", "reciprocal": "(({}).abs() + 0.5)", "tan": "({}).clamp(-1, 1)",
    "acosh": "(({}).abs() + 1.5)", "tanh": "({})", "sigmoid": "({})", "sin": "({}).clamp(-50, 50)",
    "cos": "({}).clamp(-50, 50)", "erf": "({})",
}  # fmt: skip
BETWEEN = "(torch.sigmoid({}) * 0.8 + 0.1)"
STEPS = {"floor", "ceil", "round", "trunc", "sign"}
FUNCTIONALS = ("silu", "gelu", "softplus", "relu", "relu6", "hardtanh", "leaky_relu", "elu", "logsigmoid")


def _torch_name(name):
    for module, text in ((torch, "torch"), (torch.special, "torch.special"), (torch.nn.functional, "F")):
        if hasattr(module, name):
            return f"{text}.{name}"
    return None


UNARY = [(name, _torch_name(name)) for name, op in OPS.items() if op.arity == 1 and op.rule == "float"]
UNARY = [(name, text) for name, text in UNARY if text]
INTEGER_STEPS = [(name, _torch_name(name)) for name in OPS if name in STEPS]


@dataclass
class Mods:
    """Draws mods. `kind` decides what becomes part of a kernel, `data` the numbers that change from call to call."""

    kind: Random
    data: Random
    N: int
    allow_outside: bool  # reads outside of a captured tensor, which options.debug refuses
    captures: dict = field(default_factory=dict)

    # --- Captures -----------------------------------------------------------------------------------------------------

    def capture(self, value) -> str:
        name = f"c{len(self.captures)}"
        self.captures[name] = value
        return name

    def number(self) -> str:
        """A small integer: a literal, a captured one, or a 0-d tensor."""
        small = self.data.choice((0, 1, 2, 3, 5, 7, 16, 30, -1, -4, self.N // 2, self.N))
        form = self.kind.choice(("literal", "captured", "captured", "tensor"))
        if form == "literal":
            return f"({self.kind.choice((0, 1, 2, 3, 5, 16))})"
        if form == "captured":
            return self.capture(small)
        dtype = self.kind.choice(("int64", "int32"))
        return self.capture(Captured((), dtype, small, small, on_cpu=self.kind.random() < 0.5))

    def huge(self) -> str:
        return self.capture(self.data.choice(HUGE))

    def positive(self) -> str:
        """A divisor."""
        if self.kind.random() < 0.6:
            return str(self.kind.choice((1, 2, 3, 4, 7, 16)))
        return self.capture(self.data.choice((1, 2, 3, 5, 8)))

    def factor(self) -> str:
        """A Python float, of moderate size."""
        value = self.data.choice((0.5, -0.25, 1.0, 2.0, 0.1, 1e-3))
        return str(self.kind.choice((0.5, 0.3, 2.0, -1.5))) if self.kind.random() < 0.5 else self.capture(value)

    def table(self, dtype, low, high, used_in, axes=None) -> str:
        """A read of a captured tensor, with the index that its axes name."""
        if axes is None:
            axes = self.kind.choice(
                (
                    ("B",),
                    ("Hq",),
                    ("N",),
                    ("B", "N"),
                    ("Hq", "N"),
                    ("B", "Hq", "N"),
                    ("B", "Hq"),
                    ("Hq", "B"),
                    ("N", "B"),
                )
            )
        layout = self.kind.choice(LAYOUTS)
        name = self.capture(Captured(axes, dtype, low, high, layout, used_in))
        return self.read(name, [{"B": "b", "Hq": "h", "N": "kv_idx"}[axis] for axis in axes], dtype)

    def read(self, name, index, dtype) -> str:
        """One element of a captured tensor, straight or through views of it."""
        form = self.kind.randrange(12)
        if form == 0:
            return f"{name}[{']['.join(index)}]"
        if form == 1:
            return f"{name}.unsqueeze(0)[0, {', '.join(index)}]"
        if form == 2:
            return f"{name}[..., {index[-1]}]" + (f"[{', '.join(index[:-1])}]" if len(index) > 1 else "")
        if form == 3 and len(index) > 1:
            return f"{name}.transpose(0, -1)[{', '.join([index[-1], *index[1:-1], index[0]])}]"
        if form == 4 and len(index) > 1:
            return f"{name}[:, {index[1]}][{', '.join([index[0], *index[2:]])}]"
        if form == 5 and "float8" not in dtype:
            cast = ".float()" if "float" in dtype else ".long()"
            return f"({name}{cast} + 0)[{', '.join(index)}]{'.bool()' if dtype == 'bool' else ''}"
        if form == 6:
            return f"{name}[None, {', '.join(index)}, None][0, 0]"
        return f"{name}[{', '.join(index)}]"

    def other_table(self, dtype, low, high, depth) -> str:
        """A read at any index: of a query's position, from the end, or outside, which gives 0."""
        forms = ["q", "mod", "end", "clamped"] + (["outside", "nested"] if self.allow_outside else [])
        form = self.kind.choice(forms)
        if form == "q" and not self.allow_outside:
            form = "mod"
        size = self.kind.choice((3, 5, 8))
        layout = self.kind.choice(LAYOUTS)
        if form == "q":
            return f"{self.capture(Captured(('P',), dtype, low, high, layout))}[q_idx]"
        if form == "end":
            return f"{self.capture(Captured(('Hq', size), dtype, low, high, layout))}[h, -1]"
        name = self.capture(Captured((size,), dtype, low, high, layout))
        if form == "mod":
            return f"{name}[{self.integer(depth)} % {size}]"
        if form == "clamped":
            return f"{name}[torch.clamp({self.tensor(self.integer(depth))}, 0, {size - 1})]"
        if form == "nested":
            inner = self.table("int32", -2, size, "", ("B", "N"))
            return f"{name}[{inner}]"
        return f"{name}[{self.integer(depth)}]"

    # --- Expressions --------------------------------------------------------------------------------------------------

    def integer(self, depth=2) -> str:
        if depth == 0:
            if self.kind.random() < 0.04:  # wraps around, as in PyTorch
                return f"({self.kind.choice(('q_idx', 'kv_idx'))} {self.kind.choice('+-*')} {self.huge()})"
            return self.kind.choice(("q_idx", "kv_idx", "(q_idx - kv_idx)", "b", "h", self.number()))
        inner = lambda: self.integer(depth - 1)
        form = self.kind.randrange(16)
        if form < 3:
            return f"({inner()} {self.kind.choice('+-*')} {inner()})"
        if form == 12:
            return f"(({self.tensor(inner())}).clamp(-30, 30) ** {self.kind.choice((0, 1, 2, 3))})"
        if form == 13:
            return (
                f"({self.tensor(inner())}).to(torch.{self.kind.choice(('int32', 'int16', 'int8', 'uint8', 'int64'))})"
            )
        if form == 14:
            rounding = self.kind.choice(("'floor'", "'trunc'"))
            return f"torch.div({self.tensor(inner())}, {self.positive()}, rounding_mode={rounding})"
        if form == 15:
            return self.kind.choice(
                (f"torch.fmod({self.tensor(inner())}, {self.positive()})", f"({self.boolean(depth - 1)} * {inner()})",
                 f"torch.sign({self.tensor(inner())})", f"(-{self.tensor(inner())})", f"(~{self.tensor(inner())})",
                 f"torch.full_like(q_idx, {self.kind.choice((3, -2))})", "q_idx.new_ones(())", "torch.tensor(7)")
            )  # fmt: skip
        if form == 3:
            return f"({inner()} {self.kind.choice(('//', '%'))} {self.positive()})"
        if form == 4:
            return f"torch.{self.kind.choice(('minimum', 'maximum'))}({self.tensor(inner())}, {self.tensor(inner())})"
        if form == 5:
            return f"({self.tensor(inner())}).abs()"
        if form == 6:
            return f"torch.clamp({self.tensor(inner())}, {self.kind.choice((-20, 0))}, {self.kind.choice((5, 40))})"
        if form == 7:
            return f"({inner()} {self.kind.choice('&|^')} {inner()})"
        if form == 8:
            return f"({inner()} {self.kind.choice(('<<', '>>'))} {self.kind.choice((0, 1, 3))})"
        if form == 9:
            return f"torch.where({self.boolean(depth - 1)}, {inner()}, {inner()})"
        low, high = self.kind.choice(((0, 100), (-20, 20)))
        dtype = self.kind.choice(INTEGERS)
        if form == 10:
            return self.table(dtype, max(low, 0) if dtype == "uint8" else low, high, "")
        return self.other_table(dtype, max(low, 0) if dtype == "uint8" else low, high, depth - 1)

    def tensor(self, text) -> str:
        """The same, but never a Python number, which torch.maximum refuses."""
        return f"({text} + 0 * q_idx)"

    def real(self, depth=2, used_in="") -> str:
        if depth == 0:
            form = self.kind.randrange(5)
            if form == 0:
                return f"({self.tensor(self.integer(0))}).clamp(-1000, 1000).float()"
            if form == 1:
                return self.other_table(self.kind.choice(FLOATS), -2, 2, 0)
            if form == 2:
                return f"(0 * score + {self.factor()})"
            return self.table(self.kind.choice(FLOATS), -2, 2, used_in)
        inner = lambda: self.real(depth - 1, used_in)
        form = self.kind.randrange(12)
        if form < 2:
            return f"({inner()} {self.kind.choice('+-*')} {inner()})"
        if form == 10:
            exact = f"({self.tensor(self.integer(depth - 1))}).clamp(-200, 200)"
            # Half types go no further: PyTorch's own loops differ in the last bit of their functions, or lack them.
            cast = self.kind.choice(
                ("half().float()", "bfloat16().float()", "double()", "to(score.dtype)", "type(torch.float32)")
            )
            return f"{exact}.{cast}"
        if form == 11:
            return self.kind.choice(
                (f"({self.boolean(depth - 1)}.float() * {inner()})", f"(-{inner()})", f"({inner()} ** 2)", "score",
                 f"torch.where({self.boolean(depth - 1)}, {inner()}, {self.factor()})", "torch.zeros_like(score)",
                 f"torch.maximum({inner()}, torch.tensor({self.kind.choice((0.5, -1.0))}))", "score.new_zeros(())",
                 f"({self.tensor(self.integer(0))} / {self.kind.choice((2, 3, 16))}).clamp(-100, 100)")
            )  # fmt: skip
        if form == 2:
            return f"({inner()} {self.kind.choice('+-*')} {self.factor()})"
        if form == 3:
            return f"torch.where({self.boolean(depth - 1)}, {inner()}, {inner()})"
        if form == 4:
            return f"torch.{self.kind.choice(('minimum', 'maximum'))}({inner()}, {inner()})"
        if form == 5:
            return f"F.{self.kind.choice(FUNCTIONALS)}(({inner()}).clamp(-20, 20))"
        if form == 6:
            name, text = self.kind.choice(INTEGER_STEPS)
            return f"{text}(({self.tensor(self.integer(depth - 1))}).clamp(-1000, 1000).float())"
        if form == 7:
            return f"({inner()} / (({inner()}).abs() + 0.5))"
        name, text = self.kind.choice(UNARY)
        return f"{text}({DOMAINS.get(name, BETWEEN).format(inner())})"

    def boolean(self, depth=2, used_in="") -> str:
        form = self.kind.randrange(8)
        if depth > 0 and form < 3:
            inner = [self.boolean(depth - 1, used_in) for _ in range(2)]
            if self.kind.random() < 0.2:
                return f"torch.logical_{self.kind.choice(('and', 'or', 'xor'))}({', '.join(inner)})"
            return f"({inner[0]} {self.kind.choice('&|^')} {inner[1]})"
        if depth > 0 and form == 3:
            return f"(~{self.boolean(depth - 1, used_in)})"
        if form == 4:
            left, period = self.tensor(self.integer(min(depth, 1))), self.kind.choice((2, 3))
            return f"({left} % {period} == {self.kind.choice((0, 1))})"
        if form == 5:
            return self.table("bool", 0, 1, used_in)
        sign = self.kind.choice(("<", "<=", ">", ">=", "==", "!="))
        return f"({self.tensor(self.integer(min(depth, 1)))} {sign} {self.integer(min(depth, 1))})"

    # --- Scores -------------------------------------------------------------------------------------------------------

    def bounded(self) -> str:
        """Numbers that a softmax can tell from one another."""
        return f"(torch.tanh({self.real(self.kind.choice((1, 2, 2, 3)), 'score')}) * 4)"

    def score(self) -> str:
        form = self.kind.randrange(16)
        if form < 5:
            return f"score + {self.bounded()}"
        if form == 5:
            return f"score * torch.sigmoid({self.real(2, 'score')})"
        if form == 6:
            return f"torch.where({self.boolean(2, 'score')}, score, -float('inf'))"
        if form == 7:
            large = self.kind.choice(("3e38", "-3e38", "-1e9", "1e4", "torch.finfo(score.dtype).min", "-1e6", "2.5e38"))
            return f"torch.where({self.boolean(1, 'score')}, score, {large})"
        if form == 8:
            return self.bounded() + " + 0 * score"
        if form == 9:
            cap = self.capture(self.data.choice((5.0, 30.0, 2.5)))
            return f"{cap} * torch.tanh(score / {cap}) + {self.bounded()}"
        if form == 10:
            return self.times()
        if form == 11:
            return f"torch.clamp(score, -float('inf'), {self.factor()}) + {self.bounded()}"
        return self.catalogue_score()

    def times(self) -> str:
        """Moments in seconds, whose differences float32 does not have."""
        start = 1.7e9
        moments = self.capture(Captured(("N",), "float64", start, start + 50))
        other = self.capture(start + 20.0) if self.kind.random() < 0.5 else f"{moments}[{self.kind.choice((0, -1))}]"
        return f"score - 0.05 * ({moments}[kv_idx] - {other}).float()" if self.N else "score * 0.5"

    def catalogue_score(self) -> str:
        name = self.kind.choice(("softcap", "alibi", "relative_bias", "t5_bias", "compose"))
        dtype = self.kind.choice(("float32", "float16", "float64"))
        if name == "softcap":
            return f"mods.softcap({self.capture(self.data.choice((2.0, 20.0, 50.0)))})"
        if name == "alibi":
            return f"mods.alibi({self.capture(Captured(('Hq',), dtype, 0.01, 0.5))})"
        if name == "relative_bias":
            return f"mods.relative_bias({self.capture(Captured(('Hq', self.kind.choice((1, 9, 65))), dtype))})"
        if name == "t5_bias":
            table = self.capture(Captured((32, "Hq"), "float32"))
            return f"mods.t5_bias({table}, bidirectional={self.kind.random() < 0.5})"
        return f"mods.compose({self.catalogue_score()}, {self.catalogue_score()})"

    # --- Masks --------------------------------------------------------------------------------------------------------

    def mask(self) -> tuple[str, str]:
        """A mask and its live intervals, or "" where they are not known."""
        if self.kind.random() < 0.3:
            return self.catalogue_mask()
        text, region = self.combined(self.kind.choice((0, 1, 1, 2, 2, 3)))
        return text, _intervals_text(region)

    def combined(self, depth):
        """A mask and its region: a list of ([lows], [highs]), or None where it may be live anywhere."""
        if depth == 0:
            return self.atom()
        (one, first), (other, second) = self.combined(depth - 1), self.combined(depth - 1)
        if self.kind.random() < 0.65:
            return f"({one} & {other})", _intersection(first, second)
        return f"({one} | {other})", _union(first, second)

    def size(self, least=1) -> str:
        """A number of tokens: captured, in a tensor for each sequence or head, or a literal."""
        form = self.kind.randrange(6)
        if form == 0:
            return str(self.kind.choice((1, 5, 16, 40)))
        if form == 1:
            return self.capture(self.data.choice(HUGE[:3]))
        if form == 2:
            dtype = self.kind.choice(("int64", "int32", "int16"))
            return self.capture(Captured(("B",), dtype, least, max(least, self.N), self.kind.choice(LAYOUTS))) + "[b]"
        if form == 3:
            dtype, most = self.kind.choice(("int64", "int32", "uint8")), max(least, min(self.N, 200))
            return self.capture(Captured(("Hq",), dtype, least, most, self.kind.choice(LAYOUTS))) + "[h]"
        return self.capture(max(least, self.data.choice((1, 2, 16, 17, self.N // 4, self.N // 2, self.N))))

    def atom(self):
        form = self.kind.randrange(13)
        if form < 2:
            return "(kv_idx <= q_idx)", [([], ["q_idx + 1"])]
        if form == 2:
            size = self.size()
            return f"(q_idx - kv_idx < {size})", [([f"q_idx - {size} + 1"], [])]
        if form == 3:
            size = self.size()
            return f"((kv_idx <= q_idx) & (q_idx - kv_idx < {size}))", [([f"q_idx - {size} + 1"], ["q_idx + 1"])]
        if form == 4:
            size = self.size(0)
            return f"(kv_idx < {size})", [([], [size])]
        if form == 5:
            size = self.size(0)
            return f"(kv_idx >= {size})", [([size], [])]
        if form == 6:
            size = self.size(0)
            return f"((q_idx - kv_idx).abs() <= {size})", [([f"q_idx - {size}"], [f"q_idx + {size} + 1"])]
        if form == 7:
            size = self.positive()
            return f"(q_idx // {size} == kv_idx // {size})", [
                ([f"q_idx // {size} * {size}"], [f"q_idx // {size} * {size} + {size}"])
            ]
        if form == 8:
            return self.kind.choice(("(kv_idx < 0)", "(q_idx < -1000000)")), None
        if form == 9:
            ids = self.capture(Captured(("B", "P"), self.kind.choice(("int32", "int64", "uint8")), 0, 3))
            return f"({ids}[b, q_idx] == {ids}[b, kv_idx])", None
        if form == 10:
            return self.table("bool", 0, 1, "mask"), None
        return self.boolean(self.kind.choice((0, 1, 2)), "mask"), None

    def catalogue_mask(self) -> tuple[str, str]:
        name = self.kind.choice(
            ("causal", "sliding_window", "streaming", "prefix_lm", "chunked", "dilated", "document", "document_offsets",
             "tree", "and_masks", "or_masks", "not_mask")
        )  # fmt: skip
        integers = self.kind.choice(("int64", "int32"))
        number = lambda: self.capture(max(1, self.data.choice((1, 4, 16, 33, self.N // 3, self.N))))
        if name == "causal":
            return "mods.causal()", "[(-inf, q_idx + 1)]"
        if name == "sliding_window":
            size = self.capture(sys.maxsize) if self.kind.random() < 0.2 else number()
            return f"mods.sliding_window({size})", f"[(q_idx - {size} + 1, q_idx + 1)]"
        if name == "streaming":
            sink, size = number(), number()
            return (
                f"mods.streaming({sink}, {size})",
                f"[(-inf, least({sink}, q_idx + 1)), (q_idx - {size} + 1, q_idx + 1)]",
            )
        if name == "prefix_lm":
            if self.kind.random() < 0.5:
                size = number()
                return f"mods.prefix_lm({size})", f"[(-inf, {size}), (-inf, q_idx + 1)]"
            size = self.capture(Captured(("B",), integers, 0, self.N))
            return f"mods.prefix_lm({size})", f"[(-inf, {size}[b]), (-inf, q_idx + 1)]"
        if name == "chunked":
            size = number()
            return f"mods.chunked({size})", f"[(q_idx // {size} * {size}, q_idx + 1)]"
        if name == "dilated":
            size, step = number(), self.capture(self.data.choice((1, 2, 3)))
            return f"mods.dilated({size}, {step})", f"[(q_idx - {size} * {step} + 1, q_idx + 1)]"
        if name == "document":
            return f"mods.document({self.capture(Captured(('B', 'P'), integers, 0, 2))})", ""
        if name == "document_offsets":
            starts = self.capture(Captured(("B",), integers, 0, self.N))
            return f"mods.document_offsets({starts})", f"[({starts}[b], q_idx + 1)]"
        if name == "tree" and not self.allow_outside:
            return "mods.causal()", "[(-inf, q_idx + 1)]"
        if name == "tree":
            drafts = self.capture(Captured((5, 5), "bool", 0, 1))
            return f"mods.tree({drafts}, {number()})", ""
        if name == "not_mask":
            return f"mods.not_mask({self.catalogue_mask()[0]})", ""
        return f"mods.{name}({self.catalogue_mask()[0]}, {self.catalogue_mask()[0]})", ""


def _intersection(first, second):
    if first is None or second is None:
        return first or second
    if len(first) * len(second) > 2:
        return first
    return [(lo + low, hi + high) for lo, hi in first for low, high in second]


def _union(first, second):
    return None if first is None or second is None or len(first) + len(second) > 2 else first + second


def _intervals_text(region) -> str:
    if region is None:
        return ""
    bound = lambda name, far, parts: f"{name}({', '.join(parts)})" if len(parts) > 1 else parts[0] if parts else far
    return "[" + ", ".join(f"({bound('most', '-inf', lo)}, {bound('least', 'inf', hi)})" for lo, hi in region) + "]"
