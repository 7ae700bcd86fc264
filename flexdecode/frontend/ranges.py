"""Integer ranges: the results that an operation of the table can have, from the ranges of its operands."""

from __future__ import annotations

from collections.abc import Sequence

IntRange = tuple[int, int]

INT64: IntRange = (-(1 << 63), (1 << 63) - 1)


def _hull(candidates: Sequence[int]) -> IntRange:
    return min(candidates), max(candidates)


def mul(a: IntRange, b: IntRange) -> IntRange:
    """Range of `a * b`."""
    return _hull([x * y for x in a for y in b])


def floor_divide(a: IntRange, b: IntRange) -> IntRange:
    """Range of `a // b`; division by zero gives 0."""
    if b[0] <= 0 <= b[1]:
        bound = max(abs(a[0]), abs(a[1]))
        return -bound, bound
    return _hull([x // y for x in a for y in b])


def remainder(a: IntRange, b: IntRange) -> IntRange:
    """Range of `a % b`; a divisor of zero gives 0."""
    if b[0] > 0:
        return (a[0], a[1]) if a[0] >= 0 and a[1] < b[0] else (0, b[1] - 1)
    if b[1] < 0:
        return b[0] + 1, 0
    bound = max(abs(b[0]), abs(b[1]))
    return -bound, bound


def absolute(a: IntRange) -> IntRange:
    """Range of `abs(a)`."""
    return (0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))), max(abs(a[0]), abs(a[1]))


def bitwise_or(a: IntRange, b: IntRange) -> IntRange:
    """Range of `|` and `^`. The result has no bit above the highest bit of the operands."""
    bits = max(v.bit_length() for v in (*a, *b))
    return (0 if min(a[0], b[0]) >= 0 else -(1 << bits)), (1 << bits) - 1


def bitwise_and(a: IntRange, b: IntRange) -> IntRange:
    """Range of `a & b`."""
    if a[0] >= 0 or b[0] >= 0:
        return 0, min(x[1] for x in (a, b) if x[0] >= 0)
    return bitwise_or(a, b)


def shift_left(a: IntRange, b: IntRange) -> IntRange:
    """Range of `a << b`."""
    if b[0] < 0 or b[1] > 62:
        return INT64
    return _hull([x << y for x in a for y in b])


def shift_right(a: IntRange, b: IntRange) -> IntRange:
    """Range of `a >> b`."""
    if b[0] < 0 or b[1] > 63:
        return INT64
    return _hull([x >> y for x in a for y in b])


def power(a: IntRange, b: IntRange) -> IntRange:
    """Range of `a ** b`."""
    if b[0] < 0 or b[1] > 63 or max(abs(a[0]), abs(a[1])) ** b[1] >= 1 << 63:
        return INT64
    corners = [x**y for x in a for y in b]
    return _hull([*corners, *(-c for c in corners), 0, 1] if a[0] < 0 else corners)
