"""What `walk` sees of a callable, and that `copy_for_trace` replaces exactly that."""

from __future__ import annotations

import abc
import enum
import functools
import gc
import math
import operator
import types
from collections import OrderedDict, namedtuple
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

from flexdecode.frontend.captures import (
    NOTHING,
    CannotRebuild,
    Followed,
    Reads,
    copy_for_trace,
    leaf_names,
    pins,
    read,
    walk,
)
from flexdecode.frontend.captures.scan import Scan, run

GLOBAL_WINDOW = 7
GLOBAL_NEVER_NAMED = 8
GLOBAL_OF_HELPER = 9
GLOBAL_CONFIG = types.SimpleNamespace(window=5, unused=6)


class Mark(int):
    """What replaces a number in these tests: a value that no capture has."""


def key(fn):
    return walk(fn)[0]


def leaves(fn):
    return walk(fn)[1]


def rebuild(fn, replacements):
    return copy_for_trace(fn, replacements, Reads("score_mod"))


def check_rebuild(fn, *args):
    """Replaces every number leaf by another value; returns what the original and the copy return for `args`.

    Asserts on the way that each leaf can be replaced on its own, and that the original stays as it was.
    """
    before_key, before = walk(fn)
    expected = fn(*args)
    numbers = [i for i, leaf in enumerate(before) if not isinstance(leaf, torch.Tensor)]
    assert rebuild(fn, {}) is fn or read(fn)[2]  # reads by name, which a copy notes
    for number in numbers:
        rebuild(fn, {number: before[number] + 1000})
    copied = rebuild(fn, {i: before[i] + 1000 for i in numbers})
    result = copied(*args)
    after_key, after = walk(fn)
    assert after_key == before_key
    assert all(a is b or a == b for a, b in zip(after, before, strict=True))
    assert fn(*args) == expected
    assert len(leaves(copied)) == len(before)
    return expected, result


# --- Functions -------------------------------------------------------------------------------------------------------


def make_closure(window: Any, bias: Any = 0):
    return lambda q, k: (q - k, window, bias)


def test_closure_numbers_and_tensors_are_leaves():
    bias = torch.randn(3)
    fn = make_closure(4, bias)
    names, (first, second) = leaf_names(fn), leaves(fn)
    assert (names, first) == (["bias", "window"], bias) or (names, second) == (["bias", "window"], 4)
    assert {id(first), second} == {id(bias), 4}


def test_key_is_hashable_and_stable_over_calls():
    fn = make_closure(4, torch.randn(3))
    assert hash(key(fn)) == hash(key(fn))
    assert key(fn) == key(fn)


def test_recreated_lambdas_share_a_key():
    keys = set()
    for window in range(10):
        keys.add(key(make_closure(window, torch.randn(window + 1))))
        gc.collect()
    assert len(keys) == 1


def test_another_function_has_another_key():
    window = 3
    assert key(lambda q: q + window) != key(lambda q: q - window)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.zeros(3), torch.zeros(3, dtype=torch.float16)),
        (torch.zeros(3), torch.zeros(3, 1)),
        (torch.zeros(3), torch.zeros(3, device="meta")),
        (torch.zeros(3), torch.zeros(3, requires_grad=True)),
        (torch.zeros(()), torch.zeros(1)),
        (True, False),
        (True, 1),
        (1, 1.0),
        (1.0, math.inf),
        (math.inf, -math.inf),
        (math.inf, math.nan),
        (None, False),
        (None, 0),
        ("causal", "full"),
        ("1", 1),
        (b"a", "a"),
        (torch.float16, torch.bfloat16),
        (torch.device("cpu"), torch.device("meta")),
        ((1, 2), (1, 2, 3)),
        ((1, 2), [1, 2]),
        (((1,), 2), ((1, 2),)),
        ({"a": 1}, {"b": 1}),
        ({"a": 1}, {1: 1}),
        ({}, ()),
        (1j, 2j),
        (torch.abs, torch.exp),
        (1, torch.zeros(())),
    ],
)
def test_the_key_tells_apart(one, other):
    assert key(make_closure(one)) != key(make_closure(other))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 2**70),
        (0.5, -0.0),
        (torch.zeros(3), torch.ones(5)),
        (torch.zeros(4, 4), torch.zeros(4, 4).t()),
        ((1, [2, {"a": 3}]), (4, [5, {"a": 6}])),
        (math.nan, math.nan),
        (float("nan"), float("nan")),
        ("caus" + str(1), "caus" + str(1)),
    ],
)
def test_the_key_is_the_same(one, other):
    assert key(make_closure(one)) == key(make_closure(other))


def test_non_finite_numbers_and_bools_are_constants():
    assert leaves(make_closure((math.inf, -math.inf, math.nan, True, None, "x"), 2.5)) == [2.5]


def test_parameters_and_tensor_subclasses_are_leaves():
    class Sub(torch.Tensor):
        pass

    parameter, sub = torch.nn.Parameter(torch.zeros(2)), torch.zeros(2).as_subclass(Sub)
    (found,) = leaves(make_closure(parameter, None))
    assert found is parameter
    (found,) = leaves(make_closure(sub, None))
    assert found is sub
    assert key(make_closure(sub)) != key(make_closure(torch.zeros(2)))


def test_rebinding_a_closure_variable_is_seen():
    window = 1

    def fn():
        return window

    before = walk(fn)
    window = 2
    assert walk(fn) == (before[0], [2])


def test_rebinding_a_global_is_seen(monkeypatch):
    fn = lambda q: q - GLOBAL_WINDOW
    before = walk(fn)
    assert before[1] == [7]
    monkeypatch.setitem(globals(), "GLOBAL_WINDOW", 70)
    assert walk(fn) == (before[0], [70])
    assert leaf_names(fn) == ["GLOBAL_WINDOW"]


def test_a_builtin_that_becomes_a_global_is_seen(monkeypatch):
    fn = lambda q: abs(q)
    before = key(fn)
    monkeypatch.setitem(globals(), "abs", 3)
    assert key(fn) != before
    assert leaves(fn) == [3]


def test_globals_in_nested_code():
    nested = lambda q: [(lambda k: k - GLOBAL_WINDOW)(q) for _ in range(1)]
    assert leaves(nested) == [7]
    assert check_rebuild(nested, 10) == ([3], [-997])


def test_globals_of_helpers_are_walked():
    assert leaves(uses_helper) == [9]
    assert leaf_names(uses_helper) == ["GLOBAL_OF_HELPER (in helper)"]
    assert check_rebuild(uses_helper, 1) == (10, 1010)


def helper(x):
    return x + GLOBAL_OF_HELPER


def uses_helper(x):
    return helper(x)


def test_unused_globals_are_not_visited():
    assert GLOBAL_NEVER_NAMED not in leaves(lambda q: q + GLOBAL_WINDOW)


def test_defaults_and_keyword_defaults():
    def fn(q, window=3, *, cap=2.5, mode="tanh"):
        return q + window + cap

    assert leaves(fn) == [3, 2.5]
    assert leaf_names(fn) == ["window", "cap"]
    assert check_rebuild(fn, 1) == (6.5, 2006.5)
    before = walk(fn)
    fn.__defaults__ = (4,)
    assert walk(fn) == (before[0], [4, 2.5])
    fn.__kwdefaults__["mode"] = "none"
    assert key(fn) != before[0]


def test_function_attributes():
    def fn(q):
        return q + fn.window

    fn.window = 3
    assert leaves(fn) == [3]
    assert check_rebuild(fn, 1) == (4, 1004)
    fn.window = 5
    assert leaves(fn) == [5]


def test_recursion():
    step = 3

    def fn(n):
        return n if n > 5 else fn(n + step)

    assert leaves(fn) == [3]
    assert check_rebuild(fn, 0) == (6, 1003)


def test_mutual_recursion():
    step = 1

    def even(n):
        return True if n <= 0 else odd(n - step)

    def odd(n):
        return False if n <= 0 else even(n - step)

    assert leaves(even) == [1, 1]  # once for each function
    assert check_rebuild(even, 3) == (False, False)


def test_an_empty_cell():
    def fn():
        return later

    empty = key(fn)
    if fn is None:
        later = 1
    assert leaves(fn) == []
    later = 2
    assert leaves(fn) == [2]
    assert key(fn) != empty


def test_a_helper_that_is_defined_in_terms_of_itself_through_a_list():
    window = 2
    table = [window]
    table.append(lambda q: q + table[0])
    fn = lambda q: table[1](q)
    assert leaves(fn) == [2]
    assert check_rebuild(fn, 1) == (3, 1003)


def test_library_functions_are_opaque_as_globals_but_walked_in_closures():
    fn = lambda q: torch.nn.functional.silu(q) + math.pi + operator.neg(q)
    assert leaves(fn) == []
    assert key(fn) == key(fn)
    assert leaves(make_closure(and_masks(make_closure(3, None)), None)) == [3]


def test_a_global_made_by_and_masks_is_walked():
    fn = lambda b, h, q, k: COMBINED(b, h, q, k)
    assert leaves(fn) == [GLOBAL_WINDOW]


def windowed(b, h, q, k):
    return q - k < GLOBAL_WINDOW


COMBINED = and_masks(windowed, noop_mask)


# --- Combinators -----------------------------------------------------------------------------------------------------


def test_and_masks_and_or_masks():
    def causal(b, h, q, k):
        return q >= k

    def window(size):
        return lambda b, h, q, k: q - k < size

    mask = lambda size: and_masks(causal, or_masks(window(size), noop_mask))
    assert key(mask(3)) == key(mask(4))
    assert key(mask(3)) != key(and_masks(causal, or_masks(window(3), causal)))
    assert leaves(mask(3)) == [3]
    assert leaf_names(mask(3)) == ["size (in mask_mods[0], in mask_mods[1])"]
    zero, five = torch.tensor(0), torch.tensor(5)
    fn = and_masks(causal, window(3))
    assert not fn(zero, zero, five, zero)
    assert rebuild(fn, {0: 10})(zero, zero, five, zero)
    assert not fn(zero, zero, five, zero)


def test_partial():
    def fn(q, window, *, cap=1.5):
        return q + window + cap

    call = functools.partial(functools.partial(fn, cap=2.5), window=4)
    assert sorted(leaves(call)) == [1.5, 2.5, 4]
    assert check_rebuild(call, 1)[1] == 2007.5
    bound = functools.partial(lambda window, q: q - window, 6)
    assert leaf_names(bound) == ["partial argument 0"]
    assert leaf_names(functools.partial(lambda q, window: q - window, window=6)) == ["partial keyword 'window'"]
    assert check_rebuild(bound, 7) == (1, -999)
    assert key(bound) != key(functools.partial(lambda window, q: q - window, 6.0))


# --- Objects ---------------------------------------------------------------------------------------------------------


class Alibi:
    base = 2
    unused_by_code = 77

    def __init__(self, slope):
        self.slope = slope
        self.name_that_no_code_spells = 99
        self._twice = slope * 2

    def __call__(self, q):
        return self.helper(q) + self.twice

    def helper(self, q):
        return q * self.base + self.slope + self.static(1) + self.of_class()

    def method(self, q):
        return self.helper(q)

    @property
    def twice(self):
        return self._twice + GLOBAL_WINDOW

    @staticmethod
    def static(x):
        return x + GLOBAL_OF_HELPER

    @classmethod
    def of_class(cls):
        return cls.base


def test_callable_object():
    fn = Alibi(3)
    assert sorted(leaves(fn)) == [2, 3, 6, 7, 9]
    assert set(leaf_names(fn)) == {
        "self.base",
        "self.slope",
        "self._twice",
        "GLOBAL_WINDOW (in self.twice)",
        "GLOBAL_OF_HELPER (in self.static)",
    }
    assert key(fn) == key(Alibi(4))
    assert check_rebuild(fn, 1) == (1 * 2 + 3 + 10 + 2 + 6 + 7, 1 * 1002 + 1003 + 1010 + 1002 + 1006 + 1007)
    assert isinstance(rebuild(fn, {0: 5}), Alibi)


def test_attributes_of_self_are_read_afresh(monkeypatch):
    fn = Alibi(3)
    before = walk(fn)
    fn.slope = 30
    assert walk(fn)[0] == before[0]
    assert 30 in leaves(fn)
    monkeypatch.setattr(Alibi, "base", 20)
    assert 20 in leaves(fn)
    fn.slope = "a string"
    assert key(fn) != before[0]


def test_replacing_a_method_is_seen(monkeypatch):
    fn = Alibi(3)
    before = key(fn)
    monkeypatch.setattr(Alibi, "helper", lambda self, q: q)
    assert key(fn) != before


def test_bound_method():
    fn = Alibi(3).method
    assert sorted(leaves(fn)) == [2, 3, 9]
    assert key(fn) == key(Alibi(5).method)
    assert key(fn) != key(Alibi(5).helper)
    assert "self.slope" in leaf_names(fn)
    assert check_rebuild(fn, 1) == (17, 1002 + 1003 + 1010 + 1002)


def test_class_method_and_captured_class():
    assert leaves(Alibi.of_class) == [2]
    assert check_rebuild(Alibi.of_class) == (2, 1002)
    fn = lambda q: q + Alibi.base
    assert leaves(fn) == [2]
    assert leaf_names(fn) == ["Alibi.base"]
    assert check_rebuild(fn, 1) == (3, 1003)
    assert Alibi.base == 2


def test_type_of_self_sees_the_replacement():
    class Mod:
        window = 4

        def __call__(self, q):
            return q + type(self).window

    assert check_rebuild(Mod(), 1) == (5, 1005)


def test_a_class_attribute_behind_an_attribute_of_the_instance():
    class Mod:
        window = 4

        def __init__(self):
            self.window = 5

        def __call__(self, q):
            return q + self.window + self.of_class()

        @classmethod
        def of_class(cls):
            return cls.window

    assert sorted(leaves(Mod())) == [4, 5]
    assert check_rebuild(Mod(), 1) == (10, 1 + 1004 + 1005)


def test_operators_of_captured_objects():
    class Table:
        def __init__(self):
            self.offset = 3

        def __getitem__(self, i):
            return i + self.offset

        def __radd__(self, x):
            return x + self.offset * GLOBAL_WINDOW

    table = Table()
    fn = lambda q: (table[q], q + table)
    assert sorted(leaves(fn)) == [3, 7]
    assert check_rebuild(fn, 1) == ((4, 22), (1004, 1 + 1003 * 1007))


@dataclass(frozen=True)
class Config:
    window: int
    cap: float = 2.5
    name: str = "a"
    other: dict = field(default_factory=dict)


def test_frozen_dataclass():
    cfg = Config(4)
    fn = lambda q: q + cfg.window
    assert leaves(fn) == [4]
    assert leaf_names(fn) == ["cfg.window"]
    assert check_rebuild(fn, 1) == (5, 1005)
    assert cfg == Config(4)


@dataclass(frozen=True)
class CallableConfig:
    window: int

    def __call__(self, q):
        return q + self.window


def test_frozen_dataclass_as_mod():
    assert check_rebuild(CallableConfig(4), 1) == (5, 1005)
    assert key(CallableConfig(4)) == key(CallableConfig(5))


@dataclass(frozen=True, slots=True)
class Slotted:
    window: int
    table: tuple = (1, 2)

    def __call__(self, q):
        return q + self.window + self.table[1]


def test_slots():
    fn = Slotted(4)
    assert sorted(leaves(fn)) == [1, 2, 4]
    assert check_rebuild(fn, 1) == (7, 1 + 1004 + 1002)
    cfg = Slotted(4)
    assert check_rebuild(lambda q: q + cfg.window, 1) == (5, 1005)


def test_an_unset_slot():
    class Mod:
        __slots__ = ("missing", "window")

        def __call__(self, q):
            return q + (self.window if hasattr(self, "window") else self.missing)

    fn = Mod()
    fn.window = 3
    assert leaves(fn) == [3]
    assert check_rebuild(fn, 1) == (4, 1004)
    before = key(fn)
    fn.missing = 3
    assert key(fn) != before


class Point(NamedTuple):
    x: int
    y: float


OldPoint = namedtuple("OldPoint", ["x", "y"])


@pytest.mark.parametrize("kind", [Point, OldPoint])
def test_namedtuple(kind):
    point = kind(1, 2.5)
    fn = lambda q: q + point.x + point[1]
    assert leaves(fn) == [1, 2.5]
    assert leaf_names(fn) == ["point[0]", "point[1]"]
    assert check_rebuild(fn, 1) == (4.5, 2004.5)
    assert isinstance(rebuild(lambda: point, {0: 5})(), kind)


def test_containers():
    class Attributes(dict):
        __getattr__ = dict.__getitem__

    class Numbers(list):
        scale = 3

    cfg = {"a": [1, (2, {"b": 3})], 4: OrderedDict(c=5)}
    attributes, items = Attributes(window=6), Numbers([7, 8])
    fn = lambda q: (q, cfg["a"][1][1]["b"], cfg[4]["c"], attributes.window, items[1], items.scale)
    assert sorted(leaves(fn)) == [1, 2, 3, 3, 5, 6, 7, 8]
    assert check_rebuild(fn, 0) == ((0, 3, 5, 6, 8, 3), (0, 1003, 1005, 1006, 1008, 1003))
    before = key(fn)
    cfg["a"].append("x")
    assert key(fn) != before


def test_of_large_containers_only_what_is_followed_is_a_leaf():
    table, names = list(range(1000)), {str(i): i for i in range(1000)}
    fn = lambda q: table[q] + names["5"]
    assert leaves(fn) == []
    assert all(pinned is not table and pinned is not names for pinned in pins(fn))
    numbers = {type(container): number for number, (container, _) in enumerate(run(fn, Scan, NOTHING).long)}
    reads = (numbers[list], ("index", 3)), (numbers[list], ("index", -1)), (numbers[dict], ("item", "5"))
    followed = Followed(reads=reads)
    assert walk(fn, followed)[1] == [3, 999, 5]
    assert leaf_names(fn, followed) == ["table[3]", "table[-1]", "names['5']"]
    table[-1] = 7
    assert walk(fn, followed)[1] == [3, 7, 5]
    whole = Followed(reads=((numbers[list], ("all", None)), (numbers[dict], ("len", None))))
    assert walk(fn, whole)[1] == table
    assert 1000 in walk(fn, whole)[0]


def test_names_that_are_followed():
    cfg = types.SimpleNamespace(window=3, other=4)
    fn = lambda q, name: q + getattr(cfg, name)
    assert leaves(fn) == []
    assert walk(fn, Followed(names=frozenset({"window"})))[1] == [3]


def test_shared_things_stay_shared():
    bias, shared = torch.zeros(2), [1]
    fn = lambda: (shared, [shared], bias, (bias,))
    other = [1]
    assert key(fn) != key((lambda one, two: lambda: (one, two))(shared, other))
    a, b, _, _ = rebuild(fn, {leaf_names(fn).index("shared[0]"): 5})()
    assert (a, b) == ([5], [[5]])
    assert a is b[0]
    assert shared == [1]
    two = make_closure((bias,), bias)
    assert all(leaf is bias for leaf in leaves(two))
    assert key(make_closure(shared, shared)) != key(make_closure(shared, [2]))


def test_namespace_global_and_attribute_chain():
    fn = lambda q: q + GLOBAL_CONFIG.window
    assert leaves(fn) == [5]
    assert leaf_names(fn) == ["GLOBAL_CONFIG.window"]
    assert check_rebuild(fn, 1) == (6, 1006)
    cfg = types.SimpleNamespace(model=types.SimpleNamespace(window=3))
    chain = lambda q: q + cfg.model.window
    assert leaf_names(chain) == ["cfg.model.window"]
    assert check_rebuild(chain, 1) == (4, 1004)


def test_an_attribute_that_only_a_helper_names():
    cfg = types.SimpleNamespace(window=3, unused=4)

    def read(config):
        return config.window

    fn = lambda q: q + read(cfg)
    before = walk(fn)
    assert before[1] == [3]
    cfg.window = 30
    assert walk(fn) == (before[0], [30])
    assert check_rebuild(fn, 1) == (31, 1031)


def test_an_attribute_that_is_named_after_the_object_was_visited():
    cfg = types.SimpleNamespace(window=3)

    def fn(q, config=cfg, read=lambda config: config.window):
        return q + read(config)

    assert leaves(fn) == [3]
    assert check_rebuild(fn, 1) == (4, 1004)


def test_an_attribute_read_by_getattr():
    one, two = types.SimpleNamespace(window=3), types.SimpleNamespace(window=3)
    fn = lambda config: lambda q: q + getattr(config, "window")  # noqa: B009
    assert leaves(fn(one)) == [3]
    assert key(fn(one)) != key(fn(two))  # more may be read than can be seen


def test_only_attributes_of_a_model_are_visited_unless_it_is_called():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = torch.nn.Linear(2, 2)
            self.slope = 3

        def forward(self, x):
            return self.projection(x)

        def mod(self, q):
            return q + self.slope

        def make(self):
            return lambda q: q + self.slope

        def calls_itself(self, q):
            return self(q)

    layer = Layer()
    assert leaves(layer.mod) == [3]
    assert leaves(layer.make()) == [3]
    assert len(leaves(layer)) == len(leaves(layer.calls_itself)) == 2
    assert leaf_names(layer) == ["self.projection.bias", "self.projection.weight"]
    assert check_rebuild(layer.mod, 1) == check_rebuild(layer.make(), 1) == (4, 1004)


class Relative(torch.nn.Module):
    def __init__(self, cap=2.5):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("offset", torch.tensor([10.0]))
        self.cap = cap
        self.inner = Inner()

    def forward(self, q):
        return float(self.weight.detach()[q] + self.offset[0]) + self.cap + self.inner(q)


class Inner(torch.nn.Module):
    shift = 5

    def forward(self, q):
        return q + self.shift


def test_module_with_parameter_buffer_float_and_submodule():
    fn = Relative()
    assert set(leaf_names(fn)) == {"self.weight", "self.offset", "self.cap", "self.inner.shift"}
    assert any(leaf is fn.weight for leaf in leaves(fn))
    assert any(leaf is fn.offset for leaf in leaves(fn))
    assert key(fn) == key(Relative(3.5))
    assert check_rebuild(fn, 1) == (2 + 10 + 2.5 + 6, 2 + 10 + 1002.5 + 1006)
    assert Inner.shift == 5
    assert fn.inner.shift == 5
    copied = rebuild(fn, {leaf_names(fn).index("self.cap"): 3.5})
    assert copied.inner is fn.inner
    assert copied.weight is fn.weight


def test_module_tensors_can_be_replaced():
    fn = Relative()
    index = leaf_names(fn).index("self.weight")
    copied = rebuild(fn, {index: torch.tensor([100.0, 200.0])})
    assert (fn(1), copied(1)) == (20.5, 218.5)


def test_a_replaced_parameter_is_seen():
    fn = Relative()
    fn.weight = torch.nn.Parameter(torch.zeros(2))
    assert any(leaf is fn.weight for leaf in leaves(fn))


def test_module_containers_and_hooks():
    fn = torch.nn.Sequential(Inner(), torch.nn.ModuleList([Inner()])[0])
    assert check_rebuild(fn, 1) == (11, 2011)
    module = Inner()
    before = key(module)
    module.register_forward_hook(lambda module, args, output: output + GLOBAL_WINDOW)
    assert key(module) != before
    assert check_rebuild(module, 1) == (13, 2013)


def test_user_module():
    settings_module = types.ModuleType("settings_of_a_user")
    exec("WINDOW = 3\nUNUSED = 4\nSCALE = 2\ndef scaled(x):\n    return x * SCALE\n", vars(settings_module))
    fn = lambda q: settings_module.scaled(q) + settings_module.WINDOW
    assert sorted(leaves(fn)) == [2, 3]
    assert set(leaf_names(fn)) == {"settings_module.WINDOW", "SCALE (in settings_module.scaled)"}
    assert check_rebuild(fn, 1) == (5, 1002 + 1003)
    settings_module.WINDOW = 30
    assert 30 in leaves(fn)


def test_super():
    class Base:
        base_value = 3

        def __call__(self, q):
            return q + self.base_value

    class Derived(Base):
        def __call__(self, q):
            return super().__call__(q) + GLOBAL_WINDOW

    fn = Derived()
    assert sorted(leaves(fn)) == [3, 7]
    window = leaf_names(fn).index("GLOBAL_WINDOW")
    assert rebuild(fn, {window: 1000})(1) == 1004
    before = key(fn)
    Base.__call__ = lambda self, q: q
    assert key(fn) != before


# --- Numbers that are not plain numbers ------------------------------------------------------------------------------


def test_enums_are_constants():
    class Mode(enum.Enum):
        A = 1
        B = 2

    class Level(enum.IntEnum):
        LOW = 1
        HIGH = 2

    for kind in (Mode, Level):
        one, other = kind
        assert leaves(make_closure(one, "x")) == []
        assert key(make_closure(one)) == key(make_closure(one))
        assert key(make_closure(one)) != key(make_closure(other))
    fn = lambda q: q if Mode.A is Mode.B else Level.LOW
    assert leaves(fn) == []


def test_numpy_numbers_are_leaves():
    np = pytest.importorskip("numpy")
    for value, plain in ((np.float64(0.5), 0.5), (np.int64(3), 3), (np.float32(0.5), 0.5)):
        (leaf,) = leaves(make_closure(value, None))
        assert (leaf, type(leaf)) == (plain, type(plain))
        assert key(make_closure(value)) == key(make_closure(value + 1))
        assert key(make_closure(value)) != key(make_closure(plain))
    assert leaves(make_closure(np.float64("inf"), None)) == []
    assert key(make_closure(np.float64("inf"))) != key(make_closure(np.float64("-inf")))


def test_sets_count_by_their_contents():
    assert key(make_closure({1, 2})) == key(make_closure({1, 2})) != key(make_closure({1, 3}))
    assert key(make_closure({1, 2})) != key(make_closure(frozenset({1, 2})))
    assert key(make_closure({1})) != key(make_closure({1.0}))
    assert leaves(make_closure({1, 2}, None)) == []


def test_what_only_c_code_sees_counts_by_identity():
    one, other = object(), object()
    assert key(make_closure(one)) != key(make_closure(other))
    assert any(pinned is one for pinned in pins(make_closure(one)))


def test_a_class_with_getattr_counts_by_identity():
    class Renamed:
        def __init__(self, width):
            self.values = {"width": width}

        def __getattr__(self, name):
            return self.values["width"]

    one, other = Renamed(3), Renamed(4)
    fn = lambda config: lambda q: q + config.window
    assert key(fn(one)) != key(fn(other))
    one.values["width"] = 5
    assert leaves(fn(one)) == [5]
    assert check_rebuild(fn(one), 1) == (6, 1006)


def test_descriptors_of_the_user():
    class Scaled:
        scale = 3

        def __get__(self, obj, kind):
            return types.SimpleNamespace(value=obj.base * self.scale)

    class Mod:
        scaled = Scaled()

        def __init__(self):
            self.base = 2

        def __call__(self, q):
            return q + self.scaled.value

    assert sorted(leaves(Mod())) == [2, 3]
    assert check_rebuild(Mod(), 1) == (7, 1 + 1002 * 1003)


def test_pins_hold_the_code():
    fn = make_closure(3)
    assert fn.__code__ in pins(fn)


def test_deep_and_large_structures_end():
    nested: list = [1]
    for _ in range(5000):
        nested = [nested]
    assert walk(make_closure(nested))[1] == [0]
    many = {str(i): {str(j): [i, j, (i, j)] for j in range(64)} for i in range(64)}
    assert len(pins(make_closure(many))) > 0
    assert walk(make_closure(many))[0] == walk(make_closure(many))[0]


# --- What cannot be rebuilt ------------------------------------------------------------------------------------------


def test_cannot_rebuild_names_the_leaf():
    size = torch.zeros(3, 4).shape
    fn = lambda q: q + size[1] + GLOBAL_WINDOW
    assert leaves(fn) == [3, 4, 7]
    with pytest.raises(CannotRebuild, match="leaf 1 cannot be replaced: a Size holds integers only") as error:
        rebuild(fn, {1: object(), 2: 5})
    assert error.value.index == 1
    assert rebuild(fn, {2: 5})(1) == 10


def test_cannot_rebuild_classes_that_watch_their_subclasses():
    subclasses = []

    class Base:
        window = 3

        def __init_subclass__(cls):
            subclasses.append(cls)

        def __call__(self, q):
            return q + self.window

    with pytest.raises(CannotRebuild, match="watches its subclasses"):
        rebuild(Base(), {0: 5})
    assert subclasses == []


def test_cannot_rebuild_what_super_reaches():
    class Base:
        def __call__(self, q):
            return q + GLOBAL_WINDOW

    class Derived(Base):
        def __call__(self, q):
            return super().__call__(q)

    fn = Derived()
    assert leaves(fn) == [7]
    with pytest.raises(CannotRebuild, match=r"through `super\(\)`") as error:
        rebuild(fn, {0: 1})
    assert error.value.index == 0


def test_an_object_with_state_in_c_cannot_be_rebuilt():
    class Meters(float):
        pass

    length = Meters(3.0)
    length.window = 5
    fn = lambda q: q + length.window
    assert leaves(fn) == [5]
    with pytest.raises(CannotRebuild, match="a Meters cannot be copied"):
        rebuild(fn, {0: 1})


def test_abstract_classes_can_be_rebuilt():
    class Base(abc.ABC):
        window = 3

        @abc.abstractmethod
        def __call__(self, q): ...

    class Mod(Base):
        def __call__(self, q):
            return q + self.window

    assert check_rebuild(Mod(), 1) == (4, 1004)


def test_rebuild_of_something_without_captures():
    assert rebuild(torch.relu, {}) is torch.relu
    assert walk(torch.relu)[1] == []


# --- Generated structures --------------------------------------------------------------------------------------------


def hold_in_closure(value):
    return lambda: value


def hold_in_default(value):
    return lambda held=value: held


def hold_in_keyword_default(value):
    return lambda *, held=value: held


def hold_in_partial(value):
    return functools.partial(lambda held: held, value)


def hold_in_partial_keyword(value):
    return functools.partial(lambda held: held, held=value)


class Holder:
    def __init__(self, value):
        self.held = value

    def __call__(self):
        return self.held

    def method(self):
        return self.held


@dataclass(frozen=True, slots=True)
class SlottedHolder:
    held: object

    def __call__(self):
        return self.held


class ModuleHolder(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.__dict__["held"] = value

    def forward(self):
        return self.held


HOLDERS = [
    hold_in_closure,
    hold_in_default,
    hold_in_keyword_default,
    hold_in_partial,
    hold_in_partial_keyword,
    Holder,
    lambda value: Holder(value).method,
    SlottedHolder,
    ModuleHolder,
]
values = st.recursive(
    st.integers(0, 99) | st.floats(0, 99) | st.booleans() | st.text(max_size=2) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2) | st.integers(0, 3), inner, max_size=3)
        | st.tuples(inner, inner).map(lambda pair: Point(*pair))
        | st.tuples(st.sampled_from(HOLDERS), inner).map(lambda pair: pair[0](pair[1]))
    ),
    max_leaves=12,
)


def observe(value):
    """Lists the numbers in a structure, calling the holders in it, in the order of the structure."""
    if callable(value):
        return observe(value())
    if isinstance(value, dict):
        return [number for item in value.values() for number in observe(item)]
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in observe(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


@settings(max_examples=300, deadline=None)
@given(values, st.sampled_from(HOLDERS))
def test_walk_and_rebuild_agree(value, hold):
    fn = hold(value)
    before_key, before = walk(fn)
    assert before == observe(fn)
    assert len(leaf_names(fn)) == len(before)
    copied = rebuild(fn, {i: Mark(1000 + i) for i in range(len(before))})
    assert observe(copied) == list(range(1000, 1000 + len(before)))
    assert all(type(number) is Mark for number in observe(copied))
    assert observe(fn) == before
    assert walk(fn) == (before_key, before)
    assert rebuild(fn, {}) is fn
