"""More elementwise functions: angles, logarithms, the error function. They use functions of elementwise.py."""

import triton
import triton.language as tl
from elementwise import copysign, expm1, log1p, maximum, minimum, signbit

# --- Trigonometric and hyperbolic functions ---------------------------------------------------------------------------


@triton.jit
def atan_to_one(x):
    """Arc tangent of 0 <= x <= 1: a minimax polynomial in x**2, error 2**-26."""
    z = x * x
    tail = -0.089318268 + z * (
        0.070319143 + z * (-0.048960514 + z * (0.026305001 + z * (-0.0091446298 + z * 0.001488692)))
    )
    p = -0.3333333308 + z * (0.1999994932 + z * (-0.1428400379 + z * (0.1108826163 + z * tail)))
    return x + x * z * p


@triton.jit
def atan(x):
    """Arc tangent in radians."""
    size = tl.abs(x)
    angle = atan_to_one(tl.where(size > 1.0, 1.0 / size, size))
    return copysign(tl.where(size > 1.0, 1.5707963267948966 - angle, angle), x)


@triton.jit
def atan2(y, x):
    """Angle of the point (x, y) in radians."""
    large = maximum(tl.abs(x), tl.abs(y))
    small = minimum(tl.abs(x), tl.abs(y))
    # If |x| = |y|, also if both are infinite, the angle is half a right angle. Two zeros give 0.
    angle = atan_to_one(tl.where(small == large, tl.where(large == 0, 0.0, 1.0), small / large))
    angle = tl.where(tl.abs(y) > tl.abs(x), 1.5707963267948966 - angle, angle)
    return copysign(tl.where(signbit(x), 3.1415926535897931 - angle, angle), y)


@triton.jit
def asin_to_half(x, z):
    """Arc sine of 0 <= x <= 1/2 with z = x**2: a minimax polynomial, error 2**-29."""
    tail = 0.03026913873 + z * (0.02361181701 + z * (0.01057441552 + z * 0.03097454037))
    return x + x * z * (0.1666666669 + z * (0.07499992404 + z * (0.04464766389 + z * tail)))


@triton.jit
def asin(x):
    """Arc sine in radians; near 1 it is pi / 2 minus twice the arc sine of sqrt((1 - x) / 2)."""
    size = tl.abs(x)
    outer = size > 0.5
    z = tl.where(outer, 0.5 * (1.0 - size), x * x)
    angle = asin_to_half(tl.where(outer, tl.sqrt(z), size), z)
    return copysign(tl.where(outer, 1.5707963267948966 - 2.0 * angle, angle), x)


@triton.jit
def acos(x):
    """Arc cosine in radians."""
    size = tl.abs(x)
    outer = size > 0.5
    z = tl.where(outer, 0.5 * (1.0 - size), x * x)
    angle = asin_to_half(tl.where(outer, tl.sqrt(z), size), z)
    near_one = tl.where(x < 0, 3.1415926535897931 - 2.0 * angle, 2.0 * angle)
    return tl.where(outer, near_one, 1.5707963267948966 - copysign(angle, x))


@triton.jit
def sinc(x):
    """sin(pi x) / (pi x), 1 at 0."""
    y = x * 3.1415926535897931
    return tl.where(x == 0, 1.0, tl.sin(y) / y)


@triton.jit
def hypot(a, b):
    """Length of the vector (a, b). It overflows only if the result does."""
    large = maximum(tl.abs(a), tl.abs(b))
    ratio = minimum(tl.abs(a), tl.abs(b)) / large
    length = tl.where(large == 0, 0.0, large * tl.sqrt(1.0 + ratio * ratio))
    length = tl.where(tl.abs(a) == float("inf"), float("inf"), length)
    return tl.where(tl.abs(b) == float("inf"), float("inf"), length)


@triton.jit
def sinh(x):
    """Hyperbolic sine from expm1; for large x from exp of half the exponent, which does not overflow too early."""
    size = tl.abs(x)
    t = expm1(size)
    e = tl.exp(0.5 * size)
    return copysign(tl.where(size > 20.0, 0.5 * e * e, 0.5 * (t + t / (t + 1.0))), x)


@triton.jit
def cosh(x):
    """Hyperbolic cosine from exp of half the exponent, which does not overflow too early."""
    e = tl.exp(0.5 * tl.abs(x))
    return 0.5 * e * e + 0.5 / e / e


@triton.jit
def asinh(x):
    """Inverse hyperbolic sine; for large |x|, log(2 |x|)."""
    size = tl.abs(x)
    y = size * size
    near = log1p(size + y / (1.0 + tl.sqrt(1.0 + y)))
    return copysign(tl.where(size > 1e9, tl.log(size) + 0.69314718055994531, near), x)


@triton.jit
def acosh(x):
    """Inverse hyperbolic cosine; for large x, log(2 x)."""
    t = x - 1.0
    near = log1p(t + tl.sqrt(t * (t + 2.0)))
    return tl.where(x < 1, float("nan"), tl.where(x > 1e9, tl.log(x) + 0.69314718055994531, near))


@triton.jit
def atanh(x):
    """Inverse hyperbolic tangent, log((1 + |x|) / (1 - |x|)) / 2 with the sign of x."""
    size = tl.abs(x)
    return copysign(0.5 * log1p(2.0 * size / (1.0 - size)), x)


# --- Logarithms of sums and odds --------------------------------------------------------------------------------------


@triton.jit
def logaddexp(a, b):
    """log(e**a + e**b)."""
    larger = maximum(a, b) + log1p(tl.exp(-tl.abs(a - b)))
    return tl.where(a == b, a + 0.69314718055994531, larger)  # the difference of equal infinities is NaN


@triton.jit
def logaddexp2(a, b):
    """log2(2**a + 2**b)."""
    larger = maximum(a, b) + log1p(tl.exp2(-tl.abs(a - b))) * 1.4426950408889634
    return tl.where(a == b, a + 1.0, larger)


@triton.jit
def xlogy(x, y):
    """x log(y), 0 where x is 0 unless y is NaN."""
    return tl.where(y != y, y, tl.where(x == 0, 0.0, x * tl.log(y)))


@triton.jit
def xlog1py(x, y):
    """x log(1 + y), 0 where x is 0 unless y is NaN."""
    return tl.where(y != y, y, tl.where(x == 0, 0.0, x * log1p(y)))


@triton.jit
def entr(x):
    """-x log(x), 0 at 0 and -inf below."""
    return tl.where(x > 0, -x * tl.log(x), tl.where(x == 0, 0.0, tl.where(x < 0, float("-inf"), x)))


@triton.jit
def logit(x):
    """log(x / (1 - x)); around 1/2 the result is small, so it is computed from the exact 2 x - 1."""
    near_half = log1p((2.0 * x - 1.0) / (1.0 - x))
    return tl.where(tl.abs(x - 0.5) < 0.25, near_half, tl.log(x / (1.0 - x)))


# --- The error function and its relatives -----------------------------------------------------------------------------


@triton.jit
def exp_square(x, factor):
    """exp(factor * x**2) for x >= 0 and a factor of 1, -1 or -1/2. The square has two parts; the first is exact."""
    x = tl.minimum(x, 64.0)  # from 64 on, the result is 0 or infinite
    head = tl.floor(x * 16.0) * 0.0625
    return tl.exp(factor * (head * head)) * tl.exp(factor * ((x - head) * (x + head)))


@triton.jit
def erfcx_positive(x):
    """exp(x**2) erfc(x) for x >= 0. Its product with 1 + 2 x is a polynomial in (x - 3) / (x + 3), error 2**-28.

    Source: Shepherd and Laframboise, Chebyshev approximation of (1 + 2x) exp(x^2) erfc x, Math. Comp. 36 (1981); the
    coefficients are our own fit.
    """
    near = tl.minimum(x, 1e30)
    t = (near - 3.0) / (near + 3.0)
    p = 0.001888215701 + t * (-0.0007261608012 + t * (-0.0001042211771 + t * (7.720413938e-05 + t * 3.891751557e-06)))
    p = -0.1192736784 + t * (0.06831669729 + t * (-0.02377038871 + t * (0.002498822611 + t * p)))
    p = 1.253008058 + t * (-0.1356210682 + t * (-0.04756229383 + t * (0.129644091 + t * p)))
    return 0.5 * p / (0.5 + x)  # 2 x may overflow


@triton.jit
def erfcx(x):
    """exp(x**2) erfc(x)."""
    size = tl.abs(x)
    scaled = erfcx_positive(size)
    return tl.where(x < 0, 2.0 * exp_square(size, 1.0) - scaled, scaled)


@triton.jit
def erfc(x):
    """1 - erf(x), also exact in the tail."""
    size = tl.abs(x)
    tail = erfcx_positive(size) * exp_square(size, -1.0)
    return tl.where(size < 0.8, 1.0 - tl.erf(x), tl.where(x < 0, 2.0 - tail, tail))


@triton.jit
def ndtr(x):
    """Probability that a standard normal number is less than x."""
    y = x * 0.70710678118654752
    size = tl.abs(x)
    tail = 0.5 * erfcx_positive(tl.abs(y)) * exp_square(size, -0.5)
    return tl.where(size < 0.7, 0.5 + 0.5 * tl.erf(y), tl.where(x > 0, 1.0 - tail, tail))


@triton.jit
def log_ndtr(x):
    """Logarithm of `ndtr`, also where `ndtr` rounds to 0."""
    y = x * 0.70710678118654752
    lower = tl.log(0.5 * erfcx_positive(tl.abs(y))) - 0.5 * x * x
    return tl.where(x < -1.0, lower, log1p(-0.5 * erfc(y)))


@triton.jit
def erfinv_ratio(w):
    """erfinv(x) / x from w = -log(1 - x**2): polynomials in w, and in 1 / sqrt(w), error 2**-26.

    Source: Giles, Approximating the erfinv function, GPU Computing Gems 2 (2011), for the choice of w; the polynomials
    are our own fits.
    """
    u = w - 2.5
    p = -4.972419689e-06 + u * (-3.463985268e-06 + u * (4.681313481e-07 + u * (2.33359672e-08 + u * -8.93192597e-09)))
    p = 0.2466402791 + u * (-0.004177392875 + u * (-0.001252726392 + u * (0.0002183493862 + u * p)))
    center = 1.50140936 + u * p
    root = tl.sqrt(w)
    u = 1.0 / root - 0.346
    p = -5.076035144 + u * (-79.47097448 + u * (89.99726987 + u * (1062.01094 + u * -1897.617143)))
    p = -0.165033321 + u * (0.3000053384 + u * (1.272561375 + u * (3.447881069 + u * p)))
    outer = root * (0.9421895378 + u * p)
    u = 1.0 / root - 0.144
    p = 5.417554141 + u * (-14.36881764 + u * (48.93650604 + u * (-727.8626568 + u * 3821.221024)))
    p = -0.191547153 + u * (-0.1719692571 + u * (1.115284593 + u * (-2.140897441 + u * p)))
    tail = root * (0.98106983 + u * p)
    return tl.where(w < 5.0, center, tl.where(w < 16.5, outer, tail))


@triton.jit
def erfinv(x):
    """Inverse of erf."""
    return x * erfinv_ratio(-tl.log((1.0 - x) * (1.0 + x)))


@triton.jit
def ndtri(p):
    """Inverse of `ndtr`: sqrt(2) erfinv(2 p - 1), where 1 - (2 p - 1)**2 is 4 p (1 - p)."""
    return 1.4142135623730951 * (2.0 * p - 1.0) * erfinv_ratio(-tl.log(4.0 * p * (1.0 - p)))
