"""What a process or a thread sets for all of PyTorch does not matter: autocast, default dtype, default device."""

import contextlib
import os
import random
import threading
import time

import pytest
import torch
from support import assert_close_to_reference, make_inputs
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import KVCache, PagedKVCache, clear_cache, explain, flex_decode, merge_attention, mods
from flexdecode.reference import reference_decode
from flexdecode.report.explanation import Explanation

QUERY, KEY, VALUE = make_inputs(2, 4, 2, 2, 70, 16)
LENS = torch.tensor([70, 11])
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.1])
SECONDS = 60.0 if os.environ.get("FLEXDECODE_EXAMPLES") else 3.0


def arithmetic(score, b, h, q_idx, kv_idx):
    """Everything in which PyTorch's default dtype or device could have a say."""
    distance = (q_idx - kv_idx) / 3 + torch.exp(-(kv_idx % 5)) + torch.sqrt(h + 1) + kv_idx * 0.1
    zone = torch.where(kv_idx < 7, 0.1, 0.3) + torch.full((), 0.7) + torch.tensor(0.1)
    table = torch.tensor([0.1, 0.2, 0.3, 0.7])[h] + torch.arange(0, 1, 0.25)[h]
    return torch.where(kv_idx < 40, score * 0.1, score - SLOPES[h] * distance / 7) + zone + table + score.new_zeros(())


def everything():
    """Results of all that computes."""
    out, lse = flex_decode(QUERY, KEY, VALUE, arithmetic, mods.causal(), kv_lens=LENS, return_lse=True)
    cache = PagedKVCache(
        batch=2, num_kv_heads=2, head_dim=16, num_pages=16, page_size=16, dtype=torch.int8, device="cpu"
    )
    cache.append(KEY, VALUE)
    paged, paged_lse = flex_decode(QUERY, cache=cache, score_mod=mods.alibi(4, device="cpu"), return_lse=True)
    merged = merge_attention([out, paged], [lse, paged_lse])
    return out, lse, cache.key, cache.k_scale, paged, *merged


def told():
    """Reports of two calls, without the place of the source."""
    bias = torch.ones(4, 70, dtype=torch.float32, device="cpu")
    masked = explain(
        QUERY, KEY, VALUE, lambda s, b, h, q, k: s + 0.1 * bias[h, k], mods.sliding_window(30), device="H200"
    )
    shapes = [torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (QUERY, KEY, VALUE)]
    meta = explain(*shapes, mods.softcap(0.7), kv_lens=LENS, device="H200")
    assert isinstance(masked, Explanation)
    return str(masked), str(meta)


def computed():
    """The reference."""
    return reference_decode(QUERY, KEY, VALUE, arithmetic, mods.causal(), kv_lens=LENS, return_lse=True)


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = {
    "bfloat16 autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float16 autocast": lambda: torch.autocast("cpu", torch.float16),
    "default float64": lambda: default_dtype(torch.float64),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float16": lambda: default_dtype(torch.float16),
    "meta device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_does_not_matter(setting):
    clear_cache()
    expected = everything(), told(), computed()
    for _ in range(2):  # prepared outside, and prepared within
        with SETTINGS[setting]():
            actual = everything(), told(), computed()
        for a, e in zip((*actual[0], *actual[2]), (*expected[0], *expected[2]), strict=True):
            assert a.dtype == e.dtype and a.device == e.device and torch.equal(a, e)
        assert actual[1] == expected[1]
        clear_cache()


def test_the_mod_that_shows_it():
    out, lse = everything()[:2]
    assert_close_to_reference(out, lse, QUERY, KEY, VALUE, arithmetic, mods.causal(), kv_lens=LENS)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "inference mode"])
def test_a_block_mask(setting):
    block_mask = create_block_mask(lambda b, h, q, k: k % 3 < 2, 2, 4, 128, 128, device="cpu", BLOCK_SIZE=16)
    arguments = {"block_mask": block_mask, "kv_lens": LENS, "mask_mod": mods.causal()}
    expected = flex_decode(QUERY, KEY, VALUE, **arguments)
    clear_cache()
    with SETTINGS[setting]():
        moved = create_block_mask(lambda b, h, q, k: k % 3 < 2, 2, 4, 128, 128, device="cpu", BLOCK_SIZE=16)
        assert torch.equal(flex_decode(QUERY, KEY, VALUE, **(arguments | {"block_mask": moved})), expected)


@pytest.mark.parametrize("make", [KVCache, PagedKVCache])
def test_appending_under_autocast(make):
    sizes = {"batch": 2, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float8_e4m3fn, "device": "cpu"}
    sizes |= {"max_kv_len": 80} if make is KVCache else {"num_pages": 20, "page_size": 8}
    plain, cast = make(**sizes), make(**sizes)
    plain.append(KEY, VALUE)
    with torch.autocast("cpu", torch.bfloat16):
        cast.append(KEY, VALUE)
    assert torch.equal(plain.key.float(), cast.key.float()) and torch.equal(plain.v_scale, cast.v_scale)


def test_threads_that_set_the_default_dtype():
    """Eight threads, all three entry points; `FLEXDECODE_EXAMPLES=1` makes it a minute."""
    expected = everything(), told(), computed()
    before, failures, rounds = torch.get_default_dtype(), [], []
    end = time.monotonic() + SECONDS

    def work(seed):
        chosen = random.Random(seed)
        try:
            while time.monotonic() < end:
                torch.set_default_dtype(chosen.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
                entry = chosen.randrange(3)
                actual = (everything, told, computed)[entry]()
                rounds.append(entry)
                if entry == 1:
                    assert actual == expected[1]
                else:
                    pairs = zip(actual, expected[entry], strict=True)
                    assert all(a.dtype == e.dtype and torch.equal(a, e) for a, e in pairs), entry
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch.set_default_dtype(before)
    assert not failures, failures
    assert set(rounds) == {0, 1, 2}
