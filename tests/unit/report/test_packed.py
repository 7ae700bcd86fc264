"""What `explain` says of packed queries and keys."""

import packed_cases as cases
import pytest
import torch
from packed_cases import draw

from flexdecode import explain, mods

Q_LENS, KV_LENS = [1, 0, 40, 3], [900, 500, 700, 3]
TILES = "the device divides packed tokens into tiles, so blocks are not counted"


def on_meta(arguments):
    return {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("device", [None, "H200"])
def test_bytes_are_those_of_the_padded_call(kind, device):
    """Packed keys too: those of a cache of as many tokens as are in use."""
    call = draw(Q_LENS, KV_LENS, kind, D=64, dtype=torch.float16, Hkv=1 if "latent" in kind else 2)
    window = mods.sliding_window(100)
    packed = explain(call.query, mask_mod=window, device=device, **call.arguments)
    padded = explain(mask_mod=window, device=device, **call.padded())
    assert packed.used_bytes == padded.used_bytes and packed.limit_us == (device and packed.read_bytes / 4.6e6)
    if not kind.startswith("keys"):
        assert packed.cache_bytes == padded.cache_bytes
    if device is None or packed.schedule.tiles.block_n == padded.schedule.tiles.block_n:
        assert packed.read_bytes == padded.read_bytes
    assert packed.step is None and packed.unknown == (TILES if device else padded.unknown)


def test_shapes_are_those_of_the_caller():
    call = draw(Q_LENS, KV_LENS, "keys", Dv=24)
    assert str(explain(call.query, **call.arguments)).startswith(
        "flex_decode: query [46, 4, 16], key [2108, 2, 16], value [2108, 2, 24], float32\n"
    )
    text = str(explain(call.query, device="H200", **call.arguments))
    assert "2 query heads x 46 tokens of all sequences share a KV head" in text
    assert "\n  programs  at most " in text and TILES in text


def test_shapes_alone():
    call = draw(Q_LENS, KV_LENS, "keys")
    known = {name: call.arguments[name] for name in ("cu_seqlens_q", "cu_seqlens_k")}
    meta = on_meta(call.arguments)
    for given, name in (({}, "cu_seqlens_k"), ({"cu_seqlens_k": known["cu_seqlens_k"]}, "cu_seqlens_q")):
        found = explain(call.query.to("meta"), device="H200", **meta | given)
        assert found.read_bytes is None and found.unknown == f"`{name}` is on the meta device"
    found = explain(call.query.to("meta"), device="H200", **meta | known)
    assert found.read_bytes == explain(call.query, device="H200", **call.arguments).read_bytes


def test_sequences_without_tokens_read_nothing():
    call = draw([0, 2], [900, 100])
    found = explain(call.query, device="H200", **call.arguments)
    assert found.read_bytes == found.used_bytes // 10
    for q_lens, after in (([0, 0], 0), ([0, 0], 3), ([], 3)):
        call = draw(q_lens, [5, 7][: len(q_lens)], after=after)
        assert explain(call.query, device="H200", **call.arguments).read_bytes == 0
