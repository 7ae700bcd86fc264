"""`write_kv` on the CPU: what it writes, and what it refuses."""

import pytest
import torch

import flexdecode
from flexdecode import write_kv
from flexdecode.kv.paged import PagedKVCache

PAGES, HEADS, SIZE, D, DV = 5, 2, 4, 16, 24


def arguments(**changed):
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(3, HEADS, width, generator=generator) for width in (D, DV))
    key, value = (torch.zeros(PAGES, HEADS, SIZE, width) for width in (D, DV))
    given = {"k": k, "v": v, "key": key, "value": value, "slot_mapping": torch.tensor([9, -1, 2])}
    return given | changed


def test_a_server_with_its_own_pages_decodes_what_it_wrote():
    given = arguments()
    write_kv(**given)
    assert torch.equal(given["key"][2, :, 1], given["k"][0]) and torch.equal(given["value"][0, :, 2], given["v"][2])
    assert given["key"].ne(0).any(-1).sum() == 2 * HEADS
    cache = PagedKVCache(batch=1, num_kv_heads=HEADS, num_pages=PAGES, page_size=SIZE, head_dim=D, dtype=torch.float32)
    k, v = torch.randn(2, 1, HEADS, 6, D)
    cache.append(k, v)
    key, value = (torch.zeros(PAGES, HEADS, SIZE, D) for _ in range(2))
    slots = cache.page_table[0, torch.arange(6) // SIZE] * SIZE + torch.arange(6) % SIZE
    write_kv(k[0].transpose(0, 1), v[0].transpose(0, 1), key, value, slots)
    q = torch.randn(1, 4, 1, D)
    own = flexdecode.flex_decode(q, key, value, kv_lens=cache.kv_lens, page_table=cache.page_table)
    assert torch.equal(own, flexdecode.flex_decode(q, cache=cache))


def test_float8_bytes_and_a_scale_on_the_device():
    bytes_of_key = torch.zeros(PAGES, HEADS, SIZE, D, dtype=torch.uint8)
    key, value = bytes_of_key.view(torch.float8_e4m3fn), torch.zeros(PAGES, HEADS, SIZE, DV).to(torch.float8_e4m3fn)
    given = arguments(key=key, value=value, k_scale=torch.tensor(0.5))
    write_kv(**given)
    assert torch.equal(key.float()[0, :, 2], (given["k"][2] / 0.5).to(torch.float8_e4m3fn).float())
    assert torch.equal(value.float()[0, :, 2], given["v"][2].to(torch.float8_e4m3fn).float())


INT8 = {name: torch.zeros(PAGES, HEADS, SIZE, width, dtype=torch.int8) for name, width in (("key", D), ("value", DV))}
WRONG = {
    "slots of another dtype": ({"slot_mapping": torch.zeros(3)}, r"`slot_mapping` must be int32 or int64 \[T\], got"),
    "too many slots": ({"slot_mapping": torch.arange(4)}, r"at most T = 3 entries \(from k\), got 4"),
    "packed tokens": ({"k": torch.zeros(1, HEADS, 3, D)}, r"`k` must have shape \[T, Hkv, D\] = \[T, 2, 16\], got"),
    "heads": ({"v": torch.zeros(3, 1, DV)}, r"`v` must have shape \[T, Hkv, Dv\] = \[T, 2, 24\], got \[3, 1, 24\]"),
    "tokens of v": ({"v": torch.zeros(2, HEADS, DV)}, "`v` must have as many tokens as `k`, T = 3, got 2"),
    "bytes": ({"key": INT8["key"].view(torch.uint8)}, "`key` must be float16, bfloat16, float32, float8 or int8, got"),
    "dimensions": (
        {"key": torch.zeros(PAGES, SIZE, D)},
        r"`key` must have shape \[num_pages, Hkv, page_size, D\]",
    ),
    "two dtypes": ({"value": INT8["value"]}, r"`value` must have the pages, the heads, the page size and the dtype of"),
    "a scale without need": ({"k_scale": 1.0}, "`k_scale` is for caches in float8 or int8, but `key` is torch.float32"),
    "int8 without scale": (INT8, "`k_scale` is missing: the cache is int8; pass a number, or a tensor for scales per"),
    "zero": (INT8 | {"k_scale": 0.0}, "`k_scale` must be positive, got 0.0"),
    "nan": (INT8 | {"k_scale": 1.0, "v_scale": float("nan")}, "`v_scale` must be finite, got nan"),
    "shape": (
        INT8 | {"k_scale": torch.ones(3)},
        r"`k_scale` must be a number or float32: one number, \[Hkv\] = \[2\]",
    ),
    "gradient": ({"k": torch.zeros(3, HEADS, D, requires_grad=True)}, "`k` requires grad, but a cache keeps none"),
    "value alone": (
        {"value": None},
        "`v` must be left out: the values of this cache are the first columns of",
    ),
    "sparse": ({"k": torch.zeros(3, HEADS, D).to_sparse()}, "`k` must be a dense tensor on cpu, got torch.sparse_coo"),
}
WIDE = torch.zeros(PAGES, HEADS, SIZE, 2 * DV)
SCALES = torch.ones(PAGES, HEADS, SIZE)
IN_ONE_PLACE = {
    "one tensor": (
        {"key": WIDE[..., :D], "value": WIDE[..., :DV]},
        "`value` must have memory of its own, but",
    ),
    "a part": ({"key": WIDE[..., :D], "value": WIDE[..., D - 1 : D - 1 + DV]}, "`value` must have memory of its own"),
    "expanded key": (
        {"key": torch.zeros(1, HEADS, SIZE, D).expand(PAGES, -1, -1, -1)},
        r"`key` must have a place of its own for each element, got strides \[0, 64, 16, 1\] for shape \[5, 2, 4, 16\]",
    ),
    "expanded value": (
        {"value": torch.zeros(PAGES, 1, SIZE, DV).expand(-1, HEADS, -1, -1)},
        "`value` must have a place of its own for each element",
    ),
    "one tensor of scales": (INT8 | {"k_scale": SCALES, "v_scale": SCALES}, "`v_scale` must have memory of its own"),
    "expanded scales": (
        INT8 | {"k_scale": torch.ones(PAGES, 1, SIZE).expand(-1, HEADS, -1), "v_scale": 1.0},
        "`k_scale` must have a place of its own for each element",
    ),
}
TYPES = {
    "slots": ({"slot_mapping": [1, 2, 3]}, "`slot_mapping` must be a torch.Tensor, got list"),
    "k": ({"k": None}, "`k` must be a torch.Tensor, got NoneType"),
    "key": ({"key": 3}, "`key` must be a torch.Tensor, got int"),
    "scale": (INT8 | {"k_scale": "1"}, "`k_scale` must be a number or a tensor, got str"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG)
def test_wrong_values_are_refused(changed, message):
    given = arguments(**changed)
    with pytest.raises(ValueError, match=message):
        write_kv(**given)
    for name in ("key", "value"):
        assert given[name] is None or not given[name].any()


@pytest.mark.parametrize(("changed", "message"), IN_ONE_PLACE.values(), ids=IN_ONE_PLACE)
def test_caches_that_would_overwrite_themselves_are_refused(changed, message):
    test_wrong_values_are_refused(changed, message)


@pytest.mark.parametrize("scales", [{}, dict.fromkeys(("k_scale", "v_scale"), torch.ones(HEADS))], ids=["none", "one"])
def test_halves_of_one_tensor_and_scales_that_are_only_read(scales):
    pages = torch.zeros(PAGES, SIZE, HEADS, D + DV, dtype=torch.int8 if scales else torch.float32).transpose(1, 2)
    write_kv(**arguments(key=pages[..., :D], value=pages[..., D:], **scales))
    assert pages[2, :, 1].ne(0).any()


@pytest.mark.parametrize(("changed", "message"), TYPES.values(), ids=TYPES)
def test_wrong_types_are_refused(changed, message):
    with pytest.raises(TypeError, match=message):
        write_kv(**arguments(**changed))
