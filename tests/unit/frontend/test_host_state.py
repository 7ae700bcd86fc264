"""Numbers that mods read on the host: a change is seen by the next call, or the mod is refused with the name."""

import array
import contextvars
import ctypes
import dataclasses
import enum
import functools
import itertools
import logging
import operator
import os
import random
import sys
import threading
import time
import types
import weakref
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import make_inputs

from flexdecode import DecodeOptions, TraceError, cache_info, clear_cache, flex_decode
from flexdecode.runtime.identity import graph_of, identify

QUERY, KEY, VALUE = make_inputs(2, 4, 2, 1, 19, 16)


@pytest.fixture(autouse=True)
def empty_cache():
    clear_cache()


def run(score_mod, **arguments):
    return flex_decode(QUERY, KEY, VALUE, score_mod, return_lse=True, **arguments)[1]


def bias(number):
    """What `score + number * kv_idx` gives."""
    return run(lambda s, b, h, q, k: s + number * k)


def adds(read):
    """A mod that adds a number, read from somewhere, times the position."""
    return lambda s, b, h, q, k: s + read() * k


def check(read, change, numbers=(0.5, -1.0, 2.0, 3.0)):
    """After each change the call gives what the number gives that Python reads now."""
    mod = adds(read)
    for number in numbers:
        change(number)
        torch.testing.assert_close(run(mod), bias(read()), msg=lambda text, n=number: f"after {n}: {text}")


# --- What is followed -------------------------------------------------------------------------------------------------


class Config:
    kind = "a"

    def __init__(self, **values):
        self.__dict__.update(values)


class Attributes(dict):
    __getattr__ = dict.__getitem__


class Ordered(OrderedDict):
    pass


class Chosen(set):
    pass


class Row(list):
    scale = 1


class Ring(deque):
    pass


class Missing(defaultdict):
    pass


class Local(threading.local):
    value = 0.25


class Slots:
    __slots__ = ("__weakref__", "value")


@dataclasses.dataclass
class Data:
    value: float = 0.5
    other: int = 3


Pair = namedtuple("Pair", "value other")


class Point(ctypes.Structure):
    _fields_ = (("x", ctypes.c_double), ("y", ctypes.c_int))


class Mode(enum.Enum):
    LOW = 1
    HIGH = 2


def of_mapping(table, key="w"):
    return lambda: table[key], lambda x: table.__setitem__(key, x)


def of_attribute(owner, name="value"):
    return lambda: owner.value, lambda x: setattr(owner, name, x)


def make_context():
    var = contextvars.ContextVar("slope")
    return var.get, var.set


def make_context_by_call():
    var = contextvars.ContextVar("slope")
    return lambda: var.get(), lambda x: var.set(x)


def make_context_of_dict():
    var = contextvars.ContextVar("slopes")
    var.set({"w": 1.0})
    return lambda: var.get()["w"], lambda x: var.get().__setitem__("w", x)


def make_set(kind):
    held = {"set": kind([1])}
    return lambda: sum(held["set"]), lambda x: held.__setitem__("set", kind([int(x), 7]))


def make_set_in_place():
    held = {1}

    def change(x):
        held.clear()
        held.add(x)

    return lambda: max(held), change


def make_array(*shape, dtype=np.float32):
    table = np.zeros(shape, dtype)
    place = tuple(n - 1 for n in shape)
    return lambda: table[place], lambda x: table.__setitem__(place, x)


def make_array_sum(size):
    table = np.zeros(size)
    return lambda: float(table.sum()), lambda x: table.fill(x / size)


def make_long_list(kind=list, length=80, place=3):
    table = kind([0.0] * length)
    return lambda: table[place], lambda x: table.__setitem__(place, x)


def make_long_tuple():
    held = Config(table=(0.0,) * 80)
    return lambda: held.table[3], lambda x: setattr(held, "table", (0.0, 0.0, 0.0, x, *[0.0] * 76))


def make_long_dict(kind=dict, key=lambda i: i):
    table = kind({key(i): 0.0 for i in range(80)})
    wanted = key(5)
    return lambda: table[wanted], lambda x: table.__setitem__(wanted, x)


def make_long_get():
    table = {str(i): 0.0 for i in range(80)}
    return lambda: table.get("w", 0.125), lambda x: table.__setitem__("w", x) if x < 3 else table.pop("w", None)


def make_long_set():
    chosen = set(range(100))
    return lambda: 1.0 if 200 in chosen else 2.0, lambda x: chosen.add(200) if x > 1 else chosen.discard(200)


def make_length(length):
    table = [0.0] * length
    return lambda: len(table), lambda x: table.append(x)


def make_last(kind=list):
    table = kind([0.0] * 100)
    return lambda: table[-1], lambda x: table.append(x)


def make_slice():
    table = [0.0] * 100
    return lambda: sum(table[3:6]), lambda x: table.__setitem__(4, x)


def make_whole(length=100):
    table = [0.0] * length
    return lambda: sum(table), lambda x: table.__setitem__(17, x)


def make_loop():
    table = [0.0] * 100
    return lambda: max(2 * entry for entry in table), lambda x: table.__setitem__(17, abs(x))


def make_nested_long():
    table = [[float(i)] * 70 for i in range(70)]
    return lambda: table[3][4], lambda x: table[3].__setitem__(4, x)


def make_objects_in_a_long_list():
    layers = [Config(value=0.0) for _ in range(80)]
    return lambda: layers[7].value, lambda x: setattr(layers[7], "value", x)


def make_concatenated():
    table = [0.0] * 100
    return lambda: ([1.0] + table)[4] + (table + [1.0])[3], lambda x: table.__setitem__(3, x)  # noqa: RUF005


def make_unpacked():
    table = {str(i): 0.0 for i in range(80)}
    return lambda: {**table}["7"] + dict(table)["7"], lambda x: table.__setitem__("7", x)


def make_by_name(name="w3"):
    cfg, layer = Config(w3=0.0), 3
    return lambda: getattr(cfg, f"w{layer}"), lambda x: setattr(cfg, name, x)


def make_hasattr():
    cfg = Config()

    def change(x):
        vars(cfg).clear()
        if x > 0:
            cfg.flag = True

    return lambda: 1.0 if hasattr(cfg, "flag") else 2.0, change


def make_vars(read):
    cfg = Data()
    return lambda: read(cfg), lambda x: setattr(cfg, "value", x)


def make_memo():
    held = Config(value=0.0)

    @functools.lru_cache(maxsize=4)
    def slope(layer):
        return held.value * layer

    def change(x):
        held.value = x
        slope.cache_clear()

    return lambda: slope(2), change


def make_memo_of_a_class():
    class Slopes:
        def __init__(self):
            self.value = 0.0

        @functools.lru_cache(maxsize=4)  # noqa: B019
        def slope(self, layer):
            return self.value * layer

        def __call__(self):
            return self.slope(2)

    slopes = Slopes()

    def change(x):
        slopes.value = x
        Slopes.slope.cache_clear()

    return slopes, change


def make_relative_import():
    package, module = types.ModuleType("host_state_package"), types.ModuleType("host_state_package.config")
    package.__package__, package.__path__, package.config = "host_state_package", [], module
    sys.modules.update({"host_state_package": package, "host_state_package.config": module})
    code = (
        "def relative():\n    from . import config\n    return config.W\n"
        "def names():\n    from .config import W\n    return W\n"
        "def dotted():\n    import host_state_package.config\n    return host_state_package.config.W\n"
        "def renamed():\n    import host_state_package.config as c\n    return c.W\n"
    )
    exec(code, vars(package))
    readers = [vars(package)[name] for name in ("relative", "names", "dotted", "renamed")]
    return lambda: sum(read() for read in readers), lambda x: setattr(module, "W", x)


def make_import():
    module = sys.modules["host_state_config"] = types.ModuleType("host_state_config")

    def read():
        import host_state_config

        return host_state_config.W

    return read, lambda x: setattr(module, "W", x)


def make_import_from():
    module = sys.modules["host_state_names"] = types.ModuleType("host_state_names")

    def read():
        from host_state_names import W as width

        return width

    return read, lambda x: setattr(module, "W", x)


def make_import_of_a_function():
    module = sys.modules["host_state_functions"] = types.ModuleType("host_state_functions")
    exec("W = 1.0\ndef width():\n    return W\n", vars(module))

    def read():
        from host_state_functions import width

        return width()

    return read, lambda x: setattr(module, "W", x)


def make_weak(make):
    owner = Slots()
    reference = make(owner)
    return (lambda: (reference() if callable(reference) else reference).value + 0 * id(owner)), (
        lambda x: setattr(owner, "value", x)
    )


def make_weak_values():
    owner = Slots()
    table = weakref.WeakValueDictionary(w=owner)
    return lambda: table["w"].value, lambda x: setattr(owner, "value", x)


def make_bound(make):
    table = make()
    get = table.__getitem__
    return lambda: get(0), lambda x: table.__setitem__(0, x)


def make_get():
    table = {"w": 0.0}
    get = table.get
    return lambda: get("w"), lambda x: table.__setitem__("w", x)


def make_view(name):
    table = {"w": 0.0}
    view = getattr(table, name)()
    return lambda: sum(x if name == "values" else x[1] for x in view), lambda x: table.__setitem__("w", x)


def make_proxy():
    table = {"w": 0.0}
    proxy = types.MappingProxyType(table)
    return lambda: proxy["w"], lambda x: table.__setitem__("w", x)


def make_long_proxy():
    table = dict.fromkeys(range(100), 0.0)
    proxy = types.MappingProxyType(table)
    return lambda: proxy[7], lambda x: table.__setitem__(7, x)


def make_simple_data(kind):
    number = kind(0)
    return lambda: number.value, lambda x: setattr(number, "value", type(number.value)(x))


def make_structure():
    point = Point(0.0, 1)
    return lambda: point.x * point.y, lambda x: setattr(point, "x", x)


def make_buffer(make):
    data = make(4)
    return lambda: data[2], lambda x: data.__setitem__(2, int(abs(x)))


def make_getter(getter):
    cfg = Config(value=0.0)
    return lambda: getter(cfg), lambda x: setattr(cfg, "value", x)


def make_factory():
    held = Config(value=0.0)
    table = defaultdict(lambda: held.value)

    def change(x):
        held.value = x
        table.clear()

    return lambda: table["w"], change


def make_globals():
    globals()["HOST_STATE"] = 0.0
    return lambda: globals()["HOST_STATE"], lambda x: globals().__setitem__("HOST_STATE", x)


SOURCES = {
    "deque": lambda: of_mapping(deque([1.0, 2.0], maxlen=3), 1),
    "subclass of deque": lambda: of_mapping(Ring([1.0, 2.0], maxlen=3), 1),
    "defaultdict": lambda: of_mapping(defaultdict(float)),
    "factory of a defaultdict": make_factory,
    "subclass of defaultdict": lambda: of_mapping(Missing(float)),
    "Counter": lambda: of_mapping(Counter("w")),
    "OrderedDict": lambda: of_mapping(OrderedDict()),
    "subclass of OrderedDict": lambda: of_mapping(Ordered()),
    "UserDict": lambda: of_mapping(UserDict(w=1.0)),
    "UserList": lambda: of_mapping(UserList([1.0]), 0),
    "ChainMap": lambda: of_mapping(ChainMap({}, {"w": 1.0})),
    "dict with tuples as keys": lambda: of_mapping({}, (3, "w")),
    "dict with floats as keys": lambda: of_mapping({}, 0.5),
    "dict with members of an enum as keys": lambda: of_mapping({}, Mode.HIGH),
    "dict with dtypes as keys": lambda: of_mapping({}, torch.float16),
    "dict with None as key": lambda: of_mapping({}, None),
    "ContextVar": make_context,
    "ContextVar by a call": make_context_by_call,
    "dict in a ContextVar": make_context_of_dict,
    "threading.local": lambda: of_attribute(threading.local()),
    "subclass of threading.local": lambda: of_attribute(Local()),
    "set": lambda: make_set(set),
    "frozenset": lambda: make_set(frozenset),
    "set in place": make_set_in_place,
    "array of one element": lambda: make_array(1),
    "array": lambda: make_array(3, 4),
    "array of integers": lambda: make_array(5, dtype=np.int64),
    "array of half": lambda: make_array(5, dtype=np.float16),
    "large array": lambda: make_array(200),
    "sum of an array": lambda: make_array_sum(4),
    "sum of a large array": lambda: make_array_sum(200),
    "MappingProxyType": make_proxy,
    "large MappingProxyType": make_long_proxy,
    "values of a dict": lambda: make_view("values"),
    "items of a dict": lambda: make_view("items"),
    "array.array": lambda: of_mapping(array.array("d", [0.0, 1.0]), 1),
    "bytearray": lambda: make_buffer(bytearray),
    "memoryview": lambda: make_buffer(lambda n: memoryview(bytearray(n))),
    "ctypes.c_double": lambda: make_simple_data(ctypes.c_double),
    "ctypes.c_int": lambda: make_simple_data(ctypes.c_int),
    "ctypes.Structure": make_structure,
    "ctypes.Array": lambda: make_buffer(ctypes.c_int * 4),
    "weakref.ref": lambda: make_weak(weakref.ref),
    "weakref.proxy": lambda: make_weak(weakref.proxy),
    "WeakValueDictionary": make_weak_values,
    "bound method of a list": lambda: make_bound(lambda: [0.0]),
    "bound method of a dict": lambda: make_bound(lambda: {0: 0.0}),
    "bound get": make_get,
    "lru_cache": make_memo,
    "lru_cache of a method": make_memo_of_a_class,
    "import in the mod": make_import,
    "other imports in the mod": make_relative_import,
    "from import in the mod": make_import_from,
    "import of a function in the mod": make_import_of_a_function,
    "getattr with a computed name": make_by_name,
    "hasattr": make_hasattr,
    "vars": lambda: make_vars(lambda cfg: vars(cfg)["value"]),
    "all of vars": lambda: make_vars(lambda cfg: sum(vars(cfg).values())),
    "__dict__": lambda: make_vars(lambda cfg: cfg.__dict__["value"]),
    "asdict": lambda: make_vars(lambda cfg: dataclasses.asdict(cfg)["value"]),
    "astuple": lambda: make_vars(lambda cfg: dataclasses.astuple(cfg)[0]),
    "attrgetter": lambda: make_getter(operator.attrgetter("value")),
    "attrgetter in the mod": lambda: make_getter(lambda cfg: operator.attrgetter("value")(cfg)),
    "globals": make_globals,
    "large list": make_long_list,
    "large list from the end": lambda: make_long_list(place=-2),
    "subclass of list, large": lambda: make_long_list(Row),
    "large deque": lambda: make_long_list(deque),
    "subclass of deque, large": lambda: make_long_list(Ring),
    "large tuple": make_long_tuple,
    "large dict": make_long_dict,
    "large dict with strings": lambda: make_long_dict(key=str),
    "large dict with tuples": lambda: make_long_dict(key=lambda i: (i, "w")),
    "large OrderedDict": lambda: make_long_dict(OrderedDict),
    "large dict with attributes": lambda: make_long_dict(Attributes, str),
    "large defaultdict": lambda: make_long_dict(lambda d: defaultdict(float, d)),
    "entry of a large dict that may lack": make_long_get,
    "member of a large set": make_long_set,
    "length of a list": lambda: make_length(10),
    "length of a large list": lambda: make_length(100),
    "last entry of a list that grows": make_last,
    "last entry of a deque that grows": lambda: make_last(deque),
    "slice of a large list": make_slice,
    "all of a large list": make_whole,
    "loop over a large list": make_loop,
    "large lists in a large list": make_nested_long,
    "objects in a large list": make_objects_in_a_long_list,
    "large list in a concatenation": make_concatenated,
    "copies of a large dict": make_unpacked,
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_change_is_seen(name):
    check(*SOURCES[name]())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from(sorted(SOURCES)), min_size=2, max_size=4), st.data())
def test_changes_of_several_sources(names, data):
    """Any of them changes in each step; the others stay as they are."""
    clear_cache()
    sources = [SOURCES[name]() for name in names]
    reads = [read for read, _ in sources]
    for _, change in sources:
        change(1.0)
    mod = adds(lambda: sum(read() for read in reads))
    for _ in range(4):
        torch.testing.assert_close(run(mod), bias(sum(read() for read in reads)))
        data.draw(st.sampled_from(sources))[1](float(data.draw(st.integers(-3, 3))))


FILLING = [0.0] * 70
# How each kind is made of some children, and how one of these is read.
KINDS = {
    "list": (list, operator.getitem),
    "tuple": (tuple, operator.getitem),
    "deque": (deque, operator.getitem),
    "dict": (lambda held: {f"k{i}": x for i, x in enumerate(held)}, lambda table, i: table[f"k{i}"]),
    "dict of pairs": (lambda held: {(i, "k"): x for i, x in enumerate(held)}, lambda table, i: table[i, "k"]),
    "OrderedDict": (lambda held: Ordered(enumerate(held)), operator.getitem),
    "defaultdict": (
        lambda held: defaultdict(float, enumerate(held)),
        lambda table, i: table[i if table[99] == 0 else 99],
    ),
    "proxy": (lambda held: types.MappingProxyType(dict(enumerate(held))), operator.getitem),
    "UserList": (UserList, operator.getitem),
    "attributes": (
        lambda held: Config(**{f"a{i}": x for i, x in enumerate(held)}),
        lambda cfg, i: getattr(cfg, f"a{i}"),
    ),
    "vars": (lambda held: Config(**{f"a{i}": x for i, x in enumerate(held)}), lambda cfg, i: vars(cfg)[f"a{i}"]),
    "large list": (lambda held: [*held, *FILLING], operator.getitem),
    "large list from its end": (lambda held: [*FILLING, *reversed(held)], lambda table, i: table[-1 - i]),
    "large tuple": (lambda held: (*held, *FILLING), operator.getitem),
    "large deque": (lambda held: deque([*held, *FILLING]), lambda table, i: table[i]),
    "large dict": (lambda held: dict(enumerate([*held, *FILLING])), lambda table, i: table.get(i)),
    "loop": (lambda held: [*held, *FILLING], lambda table, i: [x for x in table][i]),  # noqa: C416
    "function": (lambda held: lambda i: held[i], lambda function, i: function(i)),
    "partial": (lambda held: functools.partial(print, *held), lambda call, i: call.args[i]),
    "pair": (lambda held: Pair(held, 3), lambda pair, i: pair.value[i]),
    "set beside": (lambda held: (set(range(len(held))), *held), lambda pair, i: pair[1 + i] if i in pair[0] else None),
}
shapes = st.recursive(
    st.none(),
    lambda inner: st.tuples(st.sampled_from(sorted(KINDS)), st.lists(inner, min_size=1, max_size=3)),
    max_leaves=8,
)


def build(shape, numbers):
    if shape is None:
        return next(numbers)
    kind, inner = shape
    return KINDS[kind][0]([build(part, numbers) for part in inner])


def read_path(value, path):
    for kind, i in path:
        value = KINDS[kind][1](value, i)
    return value


def numbers_in(shape):
    return 1 if shape is None else sum(map(numbers_in, shape[1]))


@settings(max_examples=60, deadline=None)
@given(shapes, st.data())
def test_numbers_in_any_structure(shape, data):
    """Structures of containers in containers are made anew in each step; the mod reads one number of them."""
    clear_cache()
    path, part = [], shape
    while part is not None:
        kind, inner = part
        index = data.draw(st.integers(0, len(inner) - 1))
        path.append((kind, index))
        part = inner[index]
    held = Config(root=None)
    mod = adds(lambda: read_path(held.root, path))
    numbers = [float(i) for i in range(numbers_in(shape))]
    for _ in range(3):
        held.root = build(shape, iter(numbers))
        torch.testing.assert_close(run(mod), bias(read_path(held.root, path)))
        numbers[data.draw(st.integers(0, len(numbers) - 1))] = data.draw(st.sampled_from([-2.0, 0.25, 7.0, 3]))


def test_an_attribute_beside_one_that_is_read_by_a_computed_name():
    cfg, layer = Config(w3=0.5), 3
    mod = lambda s, b, h, q, k: s + (getattr(cfg, f"w{layer}") + cfg.value) * k
    for cfg.value in (1.0, 2.0, -3.0):
        torch.testing.assert_close(run(mod), bias(0.5 + cfg.value))


def test_a_subclass_of_set_that_changes_in_place():
    chosen = Chosen([1])
    check(lambda: 1.0 if 5 in chosen else 2.0, lambda x: chosen.add(5) if x > 1 else chosen.discard(5))


def test_arrays_of_other_numbers_with_the_same_bytes():
    for data in (array.array("i", [0x3F800000]), array.array("f", [1.0])):
        torch.testing.assert_close(run(adds(lambda: data[0] * 2.0**-30)), bias(data[0] * 2.0**-30))


# --- What it costs ----------------------------------------------------------------------------------------------------


def counted(mod, change, steps=5):
    """Traces and prepared calls while a number changes."""
    for step in range(steps):
        change(0.5 + step)
        run(mod)
    info = cache_info()
    return info.traces, info.calls - info.hits


ARGUMENTS = [
    "deque", "defaultdict", "ContextVar by a call", "threading.local", "dict with tuples as keys", "array",
    "MappingProxyType", "weakref.ref", "weakref.proxy", "bound get", "lru_cache", "vars",
    "getattr with a computed name",
    "large list", "large tuple", "large dict", "large list from the end", "last entry of a list that grows",
    "objects in a large list", "large lists in a large list",
]  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_numbers_are_arguments(name):
    """A change is neither a trace nor a new kernel."""
    read, change = SOURCES[name]()
    assert counted(adds(read), change) == (1, 1)


@pytest.mark.parametrize("name", ["set", "array.array", "large array", "ctypes.c_double", "import in the mod"])
def test_numbers_that_are_constants(name):
    read, change = SOURCES[name]()
    assert counted(adds(read), change, steps=3) == (3, 3)
    assert counted(adds(read), change, steps=3)[0] >= 3


def test_layers_share_a_graph():
    """One mod for all layers, with a slope for each in one list: a trace for each layer, and one graph."""
    slopes, graphs = [0.01 * layer for layer in range(80)], set()
    mod = lambda s, b, h, q, k: s + slopes[layer] * k
    for _ in range(3):
        for layer in (3, 7, 61):
            torch.testing.assert_close(run(mod), bias(slopes[layer]))
            graphs.add(graph_of("score_mod", identify("score_mod", mod), torch.device("cpu"))[0].text)
        slopes = [2 * slope for slope in slopes]
    assert cache_info().traces == 4  # and that of `bias`
    assert len(graphs) == 1


def test_tensors_of_layers_share_a_trace_each():
    tables = [torch.randn(4) for _ in range(80)]
    for _ in range(2):
        for layer in (3, 7, 61):
            found = run(lambda s, b, h, q, k: s + tables[layer][h] * k)
            table = tables[layer]
            torch.testing.assert_close(found, run(lambda s, b, h, q, k: s + table[h] * k))
        tables = [table * 2 for table in tables]
    assert cache_info().traces == 4


def test_the_walk_does_not_grow_with_a_container():
    def visited(length):
        table = [0.5] * length
        mod = adds(lambda: table[3])
        run(mod)
        return len(identify("score_mod", mod).leaves)

    assert visited(100) == visited(100_000) == 1


# --- What is refused --------------------------------------------------------------------------------------------------


def refuses(read, match):
    for _ in range(2):
        with pytest.raises(TraceError, match=match) as error:
            run(adds(read))
    return str(error.value)


def test_a_generator():
    steps = (x for x in (1.0, 2.0, 3.0))
    text = refuses(lambda: next(steps), "the score_mod reads `steps`, a generator, in which changes would go unseen")
    assert "test_host_state.py" in text and "next(steps)" in text
    assert text.endswith("Read it outside the mod and capture what it gives: numbers as they are, arrays as a tensor.")
    assert next(steps) == 1.0, "the mod took nothing from it"


@pytest.mark.parametrize("make", [itertools.count, lambda: iter([1.0]), lambda: zip([1.0]), lambda: map(abs, [1.0])])
def test_iterators(make):
    steps = make()
    refuses(lambda: next(steps), f"reads `steps`, a {type(steps).__name__}, in which")
    refuses(lambda: sum(steps), f"reads `steps`, a {type(steps).__name__}, in which")


def test_a_file(tmp_path):
    (tmp_path / "slope").write_text("0.5")
    with open(tmp_path / "slope") as file:
        refuses(lambda: float(file.read()), "reads `file`, a TextIOWrapper, in which")


def test_a_large_array():
    table = np.zeros(5000)
    refuses(lambda: table[3], "reads `table`, a ndarray, in which changes would go unseen")
    refuses(lambda: table.sum(), "reads `table`, a ndarray")
    refuses(lambda: float(table @ table), "reads `table`, a ndarray")


def test_all_of_a_very_large_list():
    table = [0.5] * 2000
    text = refuses(lambda: sum(table), "the score_mod reads all 2000 entries of `table`, too many to read again")
    assert text.endswith("Read single entries, `table[i]`, or compute the result outside the mod and capture it.")


def test_pointers():
    number = ctypes.c_double(0.5)
    pointer = ctypes.pointer(number)
    refuses(lambda: pointer.contents.value, "reads `pointer`, a LP_c_double, in which")


def test_a_computed_global():
    name = "HOST_STATE"
    text = refuses(lambda: globals()[name], r"the score_mod reads globals\(\)\['HOST_STATE'\] by a computed name")
    assert text.endswith("Write the name of the variable, or keep such values in a dict.")


def test_eval():
    slope = 0.5
    assert slope
    text = refuses(lambda: eval("slope"), r"the score_mod calls eval\(\), which may read anything")
    assert text.endswith("Call a function of your own, whose code says what it reads.")


def test_a_mod_that_changes_what_it_captures():
    log = []
    text = refuses(lambda: log.append(len(log)) or 0.5, "score_mod '<lambda>' changes what it captures")
    assert text.endswith("compute what shall change outside the mod.")


def test_a_mod_that_reads_something_else_each_time():
    table = dict.fromkeys(range(100_000), 0.5)
    refuses(lambda: table[random.randrange(100_000)], "'<lambda>' reads something else each time that it is run")


def test_a_mod_that_counts():
    cfg = Config(value=0)

    def read():
        cfg.value += 1
        return 0.5

    run(adds(read))
    run(adds(read))


def test_too_many_objects():
    many = [[[Config(value=float(i + j)) for i in range(32)] for j in range(32)] for _ in range(2)]
    text = r"the score_mod reaches more than can be read again at each call: changes of `many\[.*, go unseen\. Give it"
    with pytest.warns(RuntimeWarning, match=text):
        run(adds(lambda: many[1][31][31].value))


# --- What only a second trace finds -----------------------------------------------------------------------------------

DEBUG = DecodeOptions(debug=True)


def test_the_environment(monkeypatch):
    monkeypatch.setenv("SLOPE", "0.25")

    def from_environment(s, b, h, q, k):
        return s + float(os.environ["SLOPE"]) * k

    run(from_environment, options=DEBUG)
    run(from_environment, options=DEBUG)
    monkeypatch.setenv("SLOPE", "0.5")
    run(from_environment)  # which nobody can see
    with pytest.raises(TraceError) as error:
        run(from_environment, options=DEBUG)
    first, place, then, now, remedy = str(error.value).splitlines()
    assert first == (
        "score_mod 'from_environment' computes something else than when it was traced: `0.25` became `0.5`"
    )
    assert "test_host_state.py" in place and place.endswith("in from_environment")
    assert (then, now) == ("  then: score + 0.25 * kv_idx", "  now:  score + 0.5 * kv_idx")
    assert remedy == (
        "  It reads what Python does not show, such as a clock, random numbers, the environment or a file: read that "
        "outside the mod and capture the number or the tensor."
    )


@pytest.mark.parametrize("read", [time.perf_counter, time.time, random.random, lambda: np.random.rand()])
def test_clocks_and_random_numbers(read):
    with pytest.raises(TraceError, match=r"computes something else .* traced: `(.*)` became `(?!\1`)"):
        run(adds(read), options=DEBUG)


def test_a_file_that_the_mod_opens(tmp_path):
    file = tmp_path / "window"
    file.write_text("3")

    def mask_mod(b, h, q, k):
        return q - k < int(file.read_text())

    flex_decode(QUERY, KEY, VALUE, None, mask_mod, options=DEBUG)
    file.write_text("5")
    with pytest.raises(TraceError, match=r"mask_mod 'mask_mod' computes something else .*: `3` became `5`"):
        flex_decode(QUERY, KEY, VALUE, None, mask_mod, options=DEBUG)


def test_a_table_that_changes(monkeypatch):
    monkeypatch.setenv("SLOPE", "0.25")
    mod = lambda s, b, h, q, k: s + torch.tensor([1.0, 2.0, 3.0, float(os.environ["SLOPE"])])[h]
    run(mod, options=DEBUG)
    run(mod, options=DEBUG)
    monkeypatch.setenv("SLOPE", "0.5")
    with pytest.raises(TraceError, match="a table that it makes of numbers has other contents"):
        run(mod, options=DEBUG)


def test_another_operation(monkeypatch):
    monkeypatch.setenv("KIND", "tanh")
    cap = 2.0

    def mod(s, b, h, q, k):
        return cap * getattr(torch, os.environ["KIND"])(s / cap)

    run(mod, options=DEBUG)
    monkeypatch.setenv("KIND", "sigmoid")
    with pytest.raises(TraceError, match=r"`tanh\(score / cap\)` became `sigmoid\(score / cap\)`"):
        run(mod, options=DEBUG)


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_followed_is_no_difference(name):
    read, change = SOURCES[name]()
    mod = adds(read)
    for number in (0.5, 2.0):
        change(number)
        torch.testing.assert_close(run(mod, options=DEBUG), bias(read()))


# --- What is harmless -------------------------------------------------------------------------------------------------


def test_what_is_captured_and_not_read():
    steps, table, log = (x for x in "abc"), np.zeros(5000), deque(range(5000))
    unused = steps, table, log, threading.Lock(), open, sys, object(), {1: iter([])}

    def mod(s, b, h, q, k, held=unused):
        if held is None or steps is None or table is None or log is None:
            return s
        return s * 2

    run(mod)
    log.append(3)
    table[0] = 5
    run(mod)
    assert cache_info().traces == 1


def test_weak_references_to_what_is_gone():
    owner = Slots()
    owner.value = 0.5
    reference, proxy = weakref.ref(owner), weakref.proxy(owner)
    mod = lambda s, b, h, q, k: s * 2 if reference() is None and proxy is not None else s * reference().value
    torch.testing.assert_close(run(mod), run(lambda s, b, h, q, k: s * 0.5))
    del owner
    torch.testing.assert_close(run(mod), run(lambda s, b, h, q, k: s * 2))


def test_a_logger():
    logger = logging.getLogger("host_state")

    def mod(s, b, h, q, k):
        logger.debug("traced")
        logging.getLogger(__name__).debug("traced")
        return s * 2

    run(mod)
    run(mod)
    assert cache_info().traces == 1


def test_members_of_an_enum_and_modules_of_torch():
    layer = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Tanh())
    mode = Mode.LOW
    mod = lambda s, b, h, q, k: layer(s) if mode is Mode.LOW else s * mode.value
    for _ in range(2):
        torch.testing.assert_close(run(mod), run(lambda s, b, h, q, k: torch.tanh(torch.relu(s))))
    assert cache_info().traces == 2


def test_the_containers_of_the_user_stay_as_they_were():
    table, memo, held = [0.5] * 100, functools.lru_cache(lambda x: x), {"a": deque([1.0])}
    factory = defaultdict(float)
    before = [type(x) for x in (table, memo, held, factory)]
    run(adds(lambda: table[3] + memo(2) + held["a"][0] + factory["b"]))
    assert before == [type(x) for x in (table, memo, held, factory)]
    assert vars(memo).keys() == {"__wrapped__", "__module__", "__name__", "__qualname__", "__doc__"} | vars(memo).keys()
    assert memo.cache_info().currsize == 0 and not hasattr(table, "_flexdecode_reads")


def test_functions_of_a_module_that_reads_torch_by_name():
    kind = "tanh"
    mod = lambda s, b, h, q, k: getattr(torch, kind)(s)
    run(mod)
    torch.testing.assert_close(run(mod), run(lambda s, b, h, q, k: torch.tanh(s)))
    assert cache_info().traces == 2
