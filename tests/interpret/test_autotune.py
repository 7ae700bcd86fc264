"""Every schedule that `options.autotune` may try gives the right result, and measuring it changes no input."""

import pytest
import torch
from support import assert_close_to_reference, make_inputs, paged

from flexdecode import DecodeOptions, clear_cache, flex_decode, mods
from flexdecode.runtime import autotune
from flexdecode.runtime.launch import TritonLauncher

LENS = torch.tensor([90, 9], dtype=torch.int32)
CALLS = {
    "plain": {},
    "lengths": {"kv_lens": LENS},
    "pages": {"kv_lens": LENS, "pages": 16},
    "one split": {"kv_lens": LENS, "options": {"num_splits": 1}},
}


@pytest.mark.parametrize("name", CALLS)
def test_all_schedules(name, monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(autotune, "_is_on_gpu", lambda query: True)
    monkeypatch.setattr(autotune, "identity_of_call", lambda *_: name)
    call = dict(CALLS[name])
    query, key, value = make_inputs(2, 2, 1, 1, 96, 16)
    options, pages = call.pop("options", {}), call.pop("pages", 0)
    given = dict(call)
    caches = key, value
    if "kv_lens" in call:  # nothing past the lengths reaches the result
        for x in caches:
            for b, length in enumerate(LENS.tolist()):
                x[b, :, length:] = float("nan")
    if pages:
        (key_pages, table), (value_pages, _) = paged(key, pages), paged(value, pages)
        for b, length in enumerate(LENS.tolist()):
            table[b, -(-length // pages) :] = -1
        caches, given["page_table"] = (key_pages, value_pages), table
    before = [x.clone() for x in (query, *caches, *given.values())]
    launched, ran = set(), []
    launch = TritonLauncher.__call__

    def launch_and_note(launcher, call):
        launched.add(launcher.first.chosen)
        launch(launcher, call)

    def time_launches(runs, rounds, device):
        """The last one is the fastest, so that others are tried around it."""
        for run in runs:
            run()
        ran.append(len(runs))
        return [100.0 / (1 + i) for i in range(len(runs))]

    monkeypatch.setattr(TritonLauncher, "__call__", launch_and_note)
    monkeypatch.setattr(autotune, "time_launches", time_launches)
    clear_cache()
    tuned = DecodeOptions(backend="triton", autotune=True, **options)
    out, lse = flex_decode(query, *caches, mods.alibi(2), mods.causal(), return_lse=True, options=tuned, **given)
    assert ran and len(launched) > 3
    for now, then in zip((query, *caches, *given.values()), before, strict=True):
        assert torch.equal(now.nan_to_num(7), then.nan_to_num(7))
    whole = query, key.nan_to_num(), value.nan_to_num(), mods.alibi(2), mods.causal()
    assert_close_to_reference(out, lse, *whole, **call)
    for schedule in launched:
        tiles = schedule.tiles
        fixed = DecodeOptions(
            backend="triton",
            num_splits=schedule.num_splits,
            block_n=tiles.block_n,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
            schedule="balanced" if tiles.balanced else "split",
        )
        out, lse = flex_decode(query, *caches, mods.alibi(2), mods.causal(), return_lse=True, options=fixed, **given)
        assert_close_to_reference(out, lse, *whole, **call)
