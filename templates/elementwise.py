"""Elementwise functions that generated mods call. A kernel's module gets a copy of those that it uses."""

import triton
import triton.language as tl


@triton.jit
def float8_e4m3fn(x):
    """The float32 number with the float8_e4m3fn bits `x`, uint8. A float16 with these bits is 2**8 times smaller."""
    bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
    number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.where((x & 0x7F) == 0x7F, float("nan"), number)


@triton.jit
def float8_e5m2(x):
    """The float32 number with the float8_e5m2 bits `x`, uint8. They are the upper half of a float16."""
    return (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def floor_divide_int(a, b):
    """Integer division that rounds to minus infinity, as in Python; division by zero gives 0."""
    divisor = b + (b == 0).to(b.dtype)
    quotient = a // divisor
    quotient = tl.where((a % divisor != 0) & ((a < 0) != (b < 0)), quotient - 1, quotient)
    return tl.where(b == 0, quotient * 0, quotient)


@triton.jit
def remainder_int(a, b):
    """Integer remainder with the sign of the divisor, as in Python; a divisor of zero gives 0."""
    rest = fmod_int(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def fmod_int(a, b):
    """Integer remainder with the sign of the dividend; a divisor of zero gives 0."""
    return a % (b + (b == 0).to(b.dtype))


@triton.jit
def shift_left(a, b):
    """a << b; if b is negative or at least the width of a, the result is 0, as in PyTorch."""
    inside = (b >= 0) & (b < a.dtype.primitive_bitwidth)
    return tl.where(inside, a << tl.where(inside, b, b * 0), a * 0)


@triton.jit
def shift_right(a, b):
    """a >> b; if b is negative or at least the width of a, only the sign is left, as in PyTorch."""
    inside = (b >= 0) & (b < a.dtype.primitive_bitwidth)
    return tl.where(inside, a >> tl.where(inside, b, b * 0), a * 0 - (a < 0).to(a.dtype))


@triton.jit
def trunc(x):
    """Rounds towards zero."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def fmod_float(a, b):
    """Remainder with the sign of the dividend, exact for quotients below 2**29 (float64: 2**26)."""
    dividend = tl.abs(a).to(tl.float64)
    divisor = tl.abs(b).to(tl.float64)
    quotient = tl.floor(dividend / divisor)
    if a.dtype == tl.float64:  # split into two halves; their products are exact
        head = (divisor.to(tl.int64, bitcast=True) & -134217728).to(tl.float64, bitcast=True)
        rest = (dividend - quotient * head) - quotient * (divisor - head)
    else:
        rest = dividend - quotient * divisor
    # One step corrects the rounding of the quotient. A dividend smaller than the divisor is the remainder.
    rest = tl.where(rest < 0, rest + divisor, tl.where(rest >= divisor, rest - divisor, rest))
    rest = tl.where(dividend < divisor, dividend, rest).to(a.dtype)
    return tl.where(a < 0, -rest, rest)


@triton.jit
def remainder_float(a, b):
    """Remainder with the sign of the divisor, as in Python."""
    rest = fmod_float(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def floor_divide_float(a, b):
    """Division that rounds to minus infinity. It uses the exact remainder: 1.0 // 0.2 is 4.0, as in Python."""
    rest = fmod_float(a, b)
    quotient = round_half_even((a - rest) / b)
    quotient = tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1.0, quotient)
    return tl.where(b == 0, a / b, quotient)


@triton.jit
def pow_float(a, b):
    """a ** b; a finite negative base with a fractional exponent gives NaN."""
    size = power_of_size(tl.abs(a), b)
    odd = tl.floor(b * 0.5) * 2 != b
    integral = tl.floor(b) == b
    root = tl.where((size == 0) | (size == float("inf")), size, float("nan"))
    root = tl.where((a == 0) | (tl.abs(a) == float("inf")), root, float("nan"))
    signed = tl.where(integral, tl.where(odd, -size, size), root)
    power = tl.where(signbit(a), signed, size)
    # `|` cannot join the condition of a scalar and that of a tile in Triton's interpreter.
    power = tl.where(a != a, a, tl.where(b != b, b, power))
    return tl.where(b == 0, 1.0, tl.where(a == 1, 1.0, power))


@triton.jit
def power_of_size(a, b):
    """a ** b for a >= 0, as 2 ** (b * log2(a)). The exponent has to be more exact than float32."""
    if a.dtype == tl.float64:
        power = tl.exp2(b * tl.log2(a))
    else:
        # a = m * 2**e with m in [sqrt(1/2), sqrt(2)). The series of atanh in (m - 1) / (m + 1) gives log2(m).
        subnormal = a < 1.1754943508222875e-38
        bits = tl.where(subnormal, a * 16777216.0, a).to(tl.int32, bitcast=True)
        e = (bits - 0x3F3504F3) >> 23
        m = (bits - (e << 23)).to(tl.float32, bitcast=True).to(tl.float64)
        s = (m - 1.0) / (m + 1.0)
        z = s * s
        tail = 0.41219858311113244 + z * (0.32059889797532525 + z * (0.26230818925253881 + z * 0.22195308321368668))
        log2_m = s * (2.8853900817779268 + z * (0.96179669392597561 + z * (0.57707801635558536 + z * tail)))
        y = b.to(tl.float64) * ((e - tl.where(subnormal, 24, 0)).to(tl.float64) + log2_m)
        y = tl.where(y < -200.0, -200.0, tl.where(y > 200.0, 200.0, y))
        whole = tl.floor(y + 0.5)
        rest = tl.exp2((y - whole).to(tl.float32))
        whole = whole.to(tl.float32)
        half = tl.floor(whole * 0.5)  # 2**whole may overflow even if the power does not
        power = rest * tl.exp2(half) * tl.exp2(whole - half)
        power = tl.where(a == 0, tl.where(b < 0, float("inf"), 0.0), power)
        power = tl.where(a == float("inf"), tl.where(b < 0, 0.0, float("inf")), power)
    return tl.where(a == 1, 1.0, power)


@triton.jit
def pow_int(a, b):
    """a ** b by squaring. A negative exponent gives 0, except for the bases 1 and -1, as in PyTorch."""
    # With an exponent above 63, every base except 0, 1 and -1 overflows. For those, the parity decides.
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
def fmax(a, b):
    """The larger value; NaN only if both are NaN. `tl.maximum` treats NaN differently in different Triton releases."""
    larger = tl.where(a > b, a, b)  # b where one is NaN
    return tl.where(larger == larger, larger, tl.where(b > a, b, a))


@triton.jit
def fmin(a, b):
    """The smaller value; NaN only if both are NaN."""
    smaller = tl.where(a < b, a, b)
    return tl.where(smaller == smaller, smaller, tl.where(b < a, b, a))


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN, as in PyTorch."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def expm1(x):
    """e**x - 1 (Kahan: (u - 1) * x / log(u) with u = e**x; the error of u cancels)."""
    u = tl.exp(x)
    scaled = (u - 1.0) * (x / tl.log(u))
    return tl.where(u == 1.0, x, tl.where((u < 1e-20) | (u == float("inf")), u - 1.0, scaled))


@triton.jit
def log1p(x):
    """log(1 + x), exact for small x: log(u) with u = 1 + x, corrected by the rounding error of u."""
    u = 1.0 + x
    exact = tl.log(u) - ((u - 1.0) - x) / u
    return tl.where((u == 0) | (u == float("inf")), tl.log(u), exact)


@triton.jit
def tanh(x):
    """Hyperbolic tangent from exp, exact to float32 rounding; near 0 from an odd series, where exp would cancel."""
    t = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - t) / (1.0 + t)
    y = x * x
    series = x * (1.0 + y * (-0.33333333 + y * (0.13333333 + y * (-0.053968254 + y * 0.021869488))))
    return tl.where(y < 0.04, series, tl.where(x < 0, -size, tl.where(x == x, size, x)))


@triton.jit
def round_half_even(x):
    """Rounds to the nearest integer, ties to even; every float32 from 2**23 on is an integer (float64: 2**52)."""
    nearest = tl.floor(x + 0.5)
    past = nearest - x
    odd = tl.floor(nearest * 0.5) * 2 != nearest
    rounded = tl.where((past > 0.5) | ((past == 0.5) & odd), nearest - 1.0, nearest)
    if x.dtype == tl.float64:
        is_integer = tl.abs(x) >= 4503599627370496.0
    else:
        is_integer = tl.abs(x) >= 8388608.0
    return tl.where(is_integer, x, rounded)


# --- Bits -------------------------------------------------------------------------------------------------------------


@triton.jit
def signbit(x):
    """Whether the sign bit is set; -0 and NaN can have it, too."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
    return bits < 0


@triton.jit
def copysign(x, sign):
    """|x| with the sign of `sign`."""
    return tl.where(signbit(sign), -tl.abs(x), tl.abs(x))


@triton.jit
def nextafter(a, b):
    """The next floating-point number after a in the direction of b."""
    if a.dtype == tl.float64:
        bits = a.to(tl.int64, bitcast=True)
    else:
        bits = a.to(tl.int32, bitcast=True)
    away = tl.where(a > 0, a < b, a > b)  # from a away from zero
    moved = tl.where(away, bits + 1, bits - 1).to(a.dtype, bitcast=True)
    smallest = (bits * 0 + 1).to(a.dtype, bitcast=True)
    moved = tl.where(a == 0, copysign(smallest, b), moved)
    return tl.where(a != a, a, tl.where(b != b, b, tl.where(a == b, b, moved)))


@triton.jit
def gcd(a, b):
    """Greatest common divisor by Euclid's algorithm, in at most 1.45 steps for each bit."""
    a, b = tl.abs(a) + b * 0, tl.abs(b) + a * 0
    for _ in range(a.dtype.primitive_bitwidth * 3 // 2):
        rest = a % (b + (b == 0).to(b.dtype))
        a, b = tl.where(b == 0, a, b), tl.where(b == 0, b, rest)
    return a


@triton.jit
def lcm(a, b):
    """Least common multiple; 0 if either is 0."""
    divisor = gcd(a, b)
    return tl.abs(a // (divisor + (divisor == 0).to(divisor.dtype)) * b)
