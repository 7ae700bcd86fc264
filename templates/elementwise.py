"""Elementwise functions that generated mods call; those that a kernel uses are copied into its module."""

import triton
import triton.language as tl


@triton.jit
def floor_divide_int(a, b):
    """Integer division rounding to minus infinity, as in Python; by zero it gives 0."""
    divisor = b + (b == 0).to(b.dtype)
    quotient = a // divisor
    quotient = tl.where((a % divisor != 0) & ((a < 0) != (b < 0)), quotient - 1, quotient)
    return tl.where(b == 0, quotient * 0, quotient)


@triton.jit
def remainder_int(a, b):
    """Integer remainder with the sign of the divisor, as in Python; by zero it gives 0."""
    rest = fmod_int(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def fmod_int(a, b):
    """Integer remainder with the sign of the dividend; by zero it gives 0."""
    return a % (b + (b == 0).to(b.dtype))


@triton.jit
def shift_left(a, b):
    """a << b; an amount that is negative or not less than the width gives 0, as in PyTorch."""
    inside = (b >= 0) & (b < a.dtype.primitive_bitwidth)
    return tl.where(inside, a << tl.where(inside, b, b * 0), a * 0)


@triton.jit
def shift_right(a, b):
    """a >> b; an amount that is negative or not less than the width leaves the sign, as in PyTorch."""
    inside = (b >= 0) & (b < a.dtype.primitive_bitwidth)
    return tl.where(inside, a >> tl.where(inside, b, b * 0), a * 0 - (a < 0).to(a.dtype))


@triton.jit
def trunc(x):
    """Rounds towards zero."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def fmod_float(a, b):
    """Remainder with the sign of the dividend, exact for quotients below 2**29: their product needs 53 bits."""
    dividend = tl.abs(a).to(tl.float64)
    divisor = tl.abs(b).to(tl.float64)
    rest = dividend - tl.floor(dividend / divisor) * divisor
    # One step corrects the rounding of the quotient; a small dividend stays, whatever the divisor.
    rest = tl.where(rest < 0, rest + divisor, tl.where(rest >= divisor, rest - divisor, rest))
    rest = tl.where(dividend < divisor, dividend, rest).to(tl.float32)
    return tl.where(a < 0, -rest, rest)


@triton.jit
def remainder_float(a, b):
    """Remainder with the sign of the divisor, as in Python."""
    rest = fmod_float(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def floor_divide_float(a, b):
    """Division rounding to minus infinity; from the exact remainder, so that 1.0 // 0.2 is 4.0, as in Python."""
    return tl.where(b == 0, a / b, round_half_even((a - remainder_float(a, b)) / b))


@triton.jit
def pow_float(a, b):
    """a ** b through exp2 and log2; a finite negative base takes an integral exponent only."""
    size = tl.exp2(b * tl.log2(tl.abs(a)))
    odd = tl.floor(b * 0.5) * 2 != b
    integral = tl.floor(b) == b
    root = tl.where(tl.abs(a) == float("inf"), size, float("nan"))
    signed = tl.where(integral, tl.where(odd, -size, size), root)
    power = tl.where(a < 0, signed, size)
    return tl.where(b == 0, 1.0, tl.where(a == 1, 1.0, power))


@triton.jit
def pow_int(a, b):
    """a ** b by squaring, modulo the width; a negative exponent gives 0 but for 1 and -1, as in PyTorch."""
    # Past 63 anything but 0, 1 and -1 overflows, and for those the parity decides.
    exponent = tl.where((b < 0) | (b > 63), 62 + (b & 1), b)
    result = a * 0 + b * 0 + 1
    factor = a + b * 0
    for bit in tl.static_range(6):
        result = tl.where((exponent >> bit) & 1 == 1, result * factor, result)
        factor = factor * factor
    return tl.where((b < 0) & (tl.abs(a) > 1), result * 0, result)


@triton.jit
def maximum(a, b):
    """The larger value; NaN if either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    """The smaller value; NaN if either is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN, as in PyTorch."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def expm1(x):
    """e**x - 1; where the difference would cancel, the series, whose next term is below 2**-29 of the result."""
    tail = 0.041666667 + x * (0.0083333333 + x * (0.0013888889 + x * 0.00019841270))
    series = x * (1.0 + x * (0.5 + x * (0.16666667 + x * tail)))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x), exact for small x (Kahan: log(u) * x / (u - 1) with u = 1 + x)."""
    u = 1.0 + x
    scaled = tl.log(u) * (x / (u - 1.0))
    return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, scaled))


@triton.jit
def tanh(x):
    """Hyperbolic tangent from exp, exact to float32 rounding; an odd series near 0, where the quotient would cancel."""
    t = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - t) / (1.0 + t)
    y = x * x
    series = x * (1.0 + y * (-0.33333333 + y * (0.13333333 + y * (-0.053968254 + y * 0.021869488))))
    return tl.where(y < 0.04, series, tl.where(x < 0, -size, tl.where(x == x, size, x)))


@triton.jit
def round_half_even(x):
    """Rounds to the nearest integer, ties to even; from 2**23 on every float32 is an integer."""
    nearest = tl.floor(x + 0.5)
    past = nearest - x
    odd = tl.floor(nearest * 0.5) * 2 != nearest
    rounded = tl.where((past > 0.5) | ((past == 0.5) & odd), nearest - 1.0, nearest)
    return tl.where(tl.abs(x) >= 8388608.0, x, rounded)
