"""The report of `explain`: its wording, its numbers, its errors and its picture."""

import re
import subprocess
import sys
from html import unescape

import pytest
import torch
from support import make_inputs
from torch.nn.attention.flex_attention import create_block_mask

import flexdecode
from flexdecode import DecodeOptions, explain, flex_decode, mods
from flexdecode.call.device import DeviceFacts
from flexdecode.report.blocks import DEAD, FULL, PARTIAL
from flexdecode.report.picture import COLOURS, MAX_COLUMNS, MAX_ROWS, cells

UNSOLVED = "not solved: evaluated for every key"
SAME = "the same: the mask is evaluated only in blocks that an end cuts"


def meta_inputs(B=2, Hq=8, Hkv=2, Q=1, N=4096, D=128, dtype=torch.bfloat16):
    key = torch.empty(B, Hkv, N, D, dtype=dtype, device="meta")
    return torch.empty(B, Hq, Q, D, dtype=dtype, device="meta"), key, torch.empty_like(key)


def report(mask_mod=None, score_mod=None, **arguments):
    return explain(*meta_inputs(), score_mod, mask_mod, device="H200", **arguments)


def section(text, label):
    """The lines of a report under a label of its mods."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"  {label} "))
    end = next(i for i in range(start + 1, len(lines) + 1) if i == len(lines) or not lines[i].startswith(" " * 12))
    return [line[12:] for line in lines[start:end]]


# --- Wording ----------------------------------------------------------------------------------------------------------


def test_causal():
    text = str(report(mods.causal()))
    assert section(text, "formula") == ["kv_idx <= q_idx"]
    assert section(text, "live") == ["kv in [0, q_idx + 1)"]
    assert section(text, "full") == [SAME]
    assert "captures" not in text and "now" not in text and "2**40" not in text


def test_sliding_window():
    text = str(report(mods.sliding_window(1024)))
    assert section(text, "formula") == ["(kv_idx <= q_idx) & (q_idx - kv_idx < window)"]
    assert section(text, "captures") == ["window = 1024  (run-time argument)"]
    assert section(text, "live") == ["kv in [max(0, q_idx - window + 1), q_idx + 1)"]
    assert section(text, "now") == ["kv in [max(0, q_idx - 1023), q_idx + 1)"]
    assert section(text, "full")[0] == SAME
    assert text.count("2**40") == 1


def test_streaming():
    text = str(report(mods.streaming(4, 1024)))
    assert section(text, "live") == ["kv in [0, min(q_idx + 1, sink))", "kv in [max(0, q_idx - window + 1), q_idx + 1)"]
    assert section(text, "now") == ["kv in [0, min(4, q_idx + 1))", "kv in [max(0, q_idx - 1023), q_idx + 1)"]
    assert section(text, "full")[0] == SAME


def test_document_is_not_solved():
    found = report(mods.document(torch.zeros(2, 4096, dtype=torch.int32)))
    text = str(found)
    assert section(text, "formula") == ["document_ids[b, kv_idx] == document_ids[b, q_idx]"]
    assert section(text, "live") == [UNSOLVED]
    assert "\n  full " not in text and not found.mask_mod.solved
    assert section(text, "captures") == ["document_ids = int32 [2, 4096]  (read at every call)"]
    assert found.read_bytes == found.used_bytes == found.cache_bytes


def test_causal_document_is_live_but_nowhere_full():
    text = str(report(mods.and_masks(mods.causal(), mods.document(torch.zeros(2, 4096, dtype=torch.int32)))))
    assert section(text, "live") == ["kv in [0, q_idx + 1)"]
    assert section(text, "full") == ["nothing is proven full: the mask is evaluated for every live key"]


def test_chunked_has_a_constant():
    text = str(report(mods.chunked(512)))
    assert section(text, "captures") == ["chunk_size = 512  (constant: another value makes another kernel)"]
    assert section(text, "live") == ["kv in [max(0, 512 * (q_idx // 512)), q_idx + 1)"]
    assert section(text, "full") == [SAME]


def test_tree_is_full_before_the_drafts():
    found = report(mods.tree(torch.ones(8, 8, dtype=torch.bool), torch.tensor([4000, 100])))
    text = str(found)
    assert found.mask_mod.full == ("kv in [0, number[b])",)
    assert section(text, "full")[:2] == ["kv in [0, number[b])", "the mask is evaluated in all other live blocks"]
    assert "ancestors[q_idx - number[b], kv_idx - number[b]]" in found.mask_mod.formula


def test_window_per_head():
    windows = torch.tensor([16, 64, 256, 1024]).repeat_interleave(2)

    def head_window(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < windows[h])

    found = report(head_window)
    text = str(found)
    assert "mask_mod head_window\n" in text
    assert section(text, "live") == ["kv in [max(0, q_idx - windows[h] + 1), q_idx + 1)"]
    assert section(text, "full")[0] == SAME
    assert found.mask_mod.live_now == found.mask_mod.live  # no captured number in it
    assert found.step.work.tolist() == [1, 16, 1, 16]  # a KV head takes the widest window of its query heads


def test_a_mask_that_hides_everything():
    text = str(report(lambda b, h, q_idx, kv_idx: kv_idx < 0))
    assert section(text, "live") == ["no key"]
    assert "read      0 bytes" in text


def test_scores():
    text = str(report(score_mod=mods.alibi(8)))
    assert section(text, "formula") == ["score - slopes[h] * (q_idx - kv_idx)"]
    assert section(text, "live") == ["every key"]
    window = 100

    def masking(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx - kv_idx < window, score, -float("inf"))

    text = str(report(score_mod=masking))
    assert section(text, "live") == ["kv in [max(0, q_idx - window + 1), kv_len)", "elsewhere the score is -inf"]
    assert section(text, "now")[0] == "kv in [max(0, q_idx - 99), kv_len)"


def test_no_mods():
    assert "no mods: plain attention" in str(report())


def test_the_canonical_graph_is_in_the_report():
    found = report(mods.causal(), mods.softcap(30.0))
    for mod in (found.score_mod, found.mask_mod):
        assert "\n".join("    " + line for line in mod.graph.splitlines()) in str(found)


def one_load(score_mod=None, mask_mod=None, **arguments):
    """The one load of a report, as a field and as text."""
    found = report(mask_mod, score_mod, **arguments)
    (load,) = (load for mod in (found.score_mod, found.mask_mod) if mod is not None for load in mod.loads)
    return load, section(str(found), "loads")


def test_loads_say_what_is_checked():
    table = torch.zeros(8, 4096)

    def mod(score, b, h, q_idx, kv_idx):
        return score + table[h, kv_idx - 1]

    load, text = one_load(mod)
    assert (load.text, load.checked, load.per_key) == ("table[h, kv_idx - 1]", ("kv_idx - 1",), True)
    assert text == ["table[h, kv_idx - 1]  bounds-checked (kv_idx - 1): out of range gives 0, read for every key"]
    table = torch.zeros(7, 4000)
    assert one_load(mod)[0].checked == ("h", "kv_idx - 1")


def test_loads_that_are_proven():
    assert one_load(mods.alibi(8))[1] == ["slopes[h]  proven in range, read once per row"]
    assert one_load(mods.alibi(torch.zeros(7)))[1] == [
        "slopes[h]  bounds-checked (h): out of range gives 0, read once per row"
    ]
    bias = torch.zeros(2, 4096)

    def mod(score, b, h, q_idx, kv_idx):
        return score + bias[b, kv_idx]

    assert one_load(mod)[1] == ["bias[b, kv_idx]  proven in range, read for every key"]
    bias = bias[:, :-1]
    assert one_load(mod)[1] == ["bias[b, kv_idx]  bounds-checked (kv_idx): out of range gives 0, read for every key"]


def test_loads_in_a_mask():
    kinds = torch.zeros(2, 4096, dtype=torch.int32)
    keep = lambda b, h, q_idx, kv_idx: kinds[b, kv_idx] > 0
    assert one_load(mask_mod=keep)[1] == ["kinds[b, kv_idx]  proven in range, read for every key"]
    kinds = kinds[:1]
    assert one_load(mask_mod=keep)[1] == [
        "kinds[b, kv_idx]  bounds-checked (b): out of range gives 0, read for every key"
    ]


def test_loads_that_are_proven_by_the_mask():
    window, bias = 64, torch.zeros(64)

    def mod(score, b, h, q_idx, kv_idx):
        return score + bias[q_idx - kv_idx]

    load, text = one_load(mod, mods.sliding_window(window))
    assert (load.checked, load.by_mask, load.per_key) == ((), True, True)
    assert text == ["bias[q_idx - kv_idx]  proven in range wherever the mask is true, read for every key"]
    for mask_mod in (mods.sliding_window(window + 1), None):
        load, text = one_load(mod, mask_mod)
        assert (load.checked, load.by_mask) == (("q_idx - kv_idx",), False)
        assert text == [
            "bias[q_idx - kv_idx]  bounds-checked (q_idx - kv_idx): out of range gives 0, read for every key"
        ]


# --- Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [100, 1024, 5000])
def test_bytes_of_a_window(window):
    kv_lens = torch.tensor([4096, 777])
    found = report(mods.sliding_window(window), kv_lens=kv_lens)
    block_n, per_key = found.schedule.tiles.block_n, 2 * (128 + 128) * 2  # two KV heads, bfloat16
    keys = sum(length - max(0, length - window) // block_n * block_n for length in kv_lens.tolist())
    assert found.read_bytes == keys * per_key
    assert found.used_bytes == int(kv_lens.sum()) * per_key
    assert found.cache_bytes == 2 * 4096 * per_key
    assert found.limit_us == found.read_bytes / 4.6e6
    assert found.share_of_bytes == found.read_bytes / found.used_bytes
    assert f"{100 * found.read_bytes / found.used_bytes:.1f}% of the bytes in use" in str(found)


def test_the_share_of_bytes_and_that_of_blocks_have_their_names():
    found = report(mods.sliding_window(30), kv_lens=torch.tensor([100, 100]), options=DecodeOptions(block_n=64))
    assert (found.share_of_blocks, found.share_of_bytes) == (0.5, 0.36)  # of each sequence the last 36 tokens
    assert "36.0% of the bytes in use\n" in str(found)
    assert "of 64 keys: 4 of 8 are read, 50.0% of the blocks in use\n" in str(found)
    empty = report(kv_lens=torch.zeros(2, dtype=torch.int32))
    assert empty.share_of_blocks is None and empty.share_of_bytes is None and "%" not in str(empty)
    unknown = report(kv_lens=torch.empty(2, dtype=torch.int32, device="meta"))
    assert unknown.share_of_blocks is None and unknown.share_of_bytes is None


def test_a_changed_capture_is_seen():
    window = 64

    def mod(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < window

    narrow = report(mod).read_bytes
    window = 1024
    assert report(mod).read_bytes > 4 * narrow


def test_kernels_and_programs():
    split, whole = (report(options=DecodeOptions(num_splits=n)) for n in (4, 1))
    assert "4 (sequence, KV head) x 4 splits = 16" in str(split)
    assert "decode_split, then decode_combine" in str(split)
    assert "decode_combine" not in str(whole)
    assert "by tensor descriptors" in str(whole)
    assert "\n            at most 1 of them on a multiprocessor at once\n" in str(whole)
    many = explain(*meta_inputs(B=65, Hkv=8, N=8192), mask_mod=mods.sliding_window(10), device="H200")
    assert "on a multiprocessor at once" not in str(many)
    assert "by pointers" in str(report(mods.document(torch.zeros(2, 4096, dtype=torch.int32))))
    assert "(sequence, KV head, row tile)" in str(explain(*meta_inputs(Q=64), device="H200"))


def test_the_source_is_the_module_that_a_call_uses():
    found = report(mods.sliding_window(10))
    text = found.source.read_text()
    assert "def decode_split(" in text and "cache.descriptor.load" in text
    assert str(found.source) in str(found)
    assert report(mods.sliding_window(11)).source == found.source  # a window is an argument
    assert report(mods.chunked(11)).source != report(mods.chunked(12)).source


def test_sequences_without_query_tokens_read_nothing():
    found = report(q_lens=torch.tensor([1, 0]))
    assert found.read_bytes * 2 == found.used_bytes
    with pytest.raises(ValueError, match="batch_invariant"):
        explain(*make_inputs(1, 2, 1, 1, 4, 16), options=DecodeOptions(batch_invariant=True))


def test_bytes_of_pages():
    query, key, value = (torch.empty(*shape, 128, dtype=torch.bfloat16, device="meta") for shape in (
        (2, 8, 1), (50, 2, 64), (50, 2, 64)
    ))  # fmt: skip
    table = torch.empty(2, 16, dtype=torch.int32, device="meta")
    found = explain(query, key, value, kv_lens=torch.tensor([1000, 10]), page_table=table, device="H200")
    per_token = 2 * 2 * 128 * 2
    assert found.cache_bytes == 50 * 64 * per_token
    assert found.used_bytes == found.read_bytes == 1010 * per_token
    assert "from pages of 64" in str(found)


def test_bytes_of_latents_and_of_quantised_keys():
    query, cache = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in (
        (2, 16, 1, 576), (2, 1, 500, 576)
    ))  # fmt: skip
    found = explain(query, cache, cache[..., :512], device="H200")
    assert found.cache_bytes == found.read_bytes == 2 * 500 * 576 * 2
    stored = torch.empty(2, 2, 500, 128, dtype=torch.int8, device="meta")
    query, scale = torch.empty(2, 8, 1, 128, dtype=torch.bfloat16, device="meta"), torch.ones(2, 2, 500)
    found = explain(query, stored, torch.empty_like(stored), k_scale=scale, v_scale=0.5, device="H200")
    assert found.cache_bytes == 2 * 2 * 500 * (2 * 128 + 4)


def test_the_workers_of_a_balanced_schedule():
    lens = torch.tensor([4096, 100])
    found = report(kv_lens=lens, options=DecodeOptions(schedule="balanced", block_n=64))
    work = found.step.work_of_programs
    assert int(work.sum()) == 2 * (64 + 2) and len(work) == found.schedule.num_splits
    assert int(work.max()) == 1 and "workers share 4 (sequence, KV head) in equal runs" in str(found)
    few = report(kv_lens=lens, options=DecodeOptions(schedule="balanced", block_n=64, num_splits=10)).step
    assert few.work_of_programs.tolist() == [14, 14, *[13] * 8]
    assert few.blocks(0)[1][:64].tolist() == sorted(few.blocks(0)[1][:64].tolist())


def test_the_facts_of_another_device():
    facts = DeviceFacts("cuda", 80, num_sms=108, shared_memory=166912)
    found = explain(*meta_inputs(), device=facts)
    assert "cuda 80, 108 multiprocessors" in str(found) and "by pointers" in str(found)
    assert found.limit_us is None and "limit" not in str(found)


def test_real_tensors_without_a_gpu_use_the_torch_backend():
    found = explain(*make_inputs(2, 4, 2, 1, 64, 16), mask_mod=mods.sliding_window(8))
    assert found.schedule is None and found.source is None
    assert found.read_bytes is None and found.share_of_bytes is None
    reason = "the torch backend has no blocks, it reads the parts of the cache where the mask can be true"
    assert f'  read      not known: {reason}; `device="H200"` explains for a GPU\n' in str(found)
    with pytest.raises(ValueError, match=f"there are no blocks to draw: {reason}"):
        found.save_picture("never.png")
    same = explain(*make_inputs(2, 4, 2, 1, 64, 16), mask_mod=mods.sliding_window(8), device="H200")
    assert same.mask_mod == found.mask_mod and same.step is not None


def test_nothing_is_called_or_compiled():
    flexdecode.clear_cache()
    report(mods.sliding_window(10))
    counts = flexdecode.cache_info()
    assert (counts.calls, counts.compilations, counts.traces) == (0, 0, 1)


def test_an_empty_batch():
    found = explain(*meta_inputs(B=0), device="H200")
    assert (found.read_bytes, found.step, found.unknown) == (0, None, "there is no query, so nothing is launched")
    assert "nothing is launched" in str(found)


def test_values_that_are_in_no_memory():
    lens = torch.empty(2, dtype=torch.int32, device="meta")
    found = report(mods.sliding_window(10), kv_lens=lens)
    assert (found.step, found.used_bytes, found.read_bytes) == (None, None, None)
    assert "read      not known: `kv_lens` is on the meta device" in str(found)
    assert "`q_offset` is on the meta device" in str(report(q_offset=lens))
    starts = torch.empty(2, dtype=torch.int64, device="meta")
    found = report(mods.document_offsets(starts))
    assert "`starts` is on the meta device" in str(found) and found.used_bytes is not None
    slopes = torch.empty(8, device="meta")  # no bound depends on it
    assert report(mods.sliding_window(10), mods.alibi(slopes)).step is not None


def test_captured_tensors_that_a_mod_makes_itself():
    def mod(score, b, h, q_idx, kv_idx):
        return score + torch.tensor([1.0, 2.0])[h % 2]

    text = str(report(score_mod=mod))
    assert "constant_0 = float32 [2]  (made inside the mod: as it was at the first call)" in text
    assert "constant_0[h % 2]" in text


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_errors_are_those_of_flex_decode():
    query, key, value = make_inputs(2, 4, 2, 1, 64, 16)
    needs_grad = torch.ones(4, requires_grad=True)

    def branch(b, h, q_idx, kv_idx):
        return True if kv_idx < q_idx else False  # noqa: SIM210

    for arguments in (
        {"key": key[:, :, :, :8]},
        {"value": value[:, :1]},
        {"kv_lens": torch.tensor([1, 65])},
        {"kv_lens": torch.tensor([1])},
        {"q_offset": 1.5},
        {"scale": "1"},
        {"options": 3},
        {"mask_mod": 3},
        {"mask_mod": branch},
        {"mask_mod": lambda b, h, q_idx: True},
        {"score_mod": lambda s, b, h, q_idx, kv_idx: s * needs_grad[h]},
        {"options": DecodeOptions(backend="triton")},
    ):
        call = {"query": query, "key": key, "value": value} | arguments
        with pytest.raises(Exception) as expected:
            flex_decode(**call)
        with pytest.raises(type(expected.value)) as error:
            explain(**call)
        assert str(error.value) == str(expected.value)


def test_errors_of_its_own():
    with pytest.raises(ValueError, match=r'`query` is on the meta device: say for which GPU, e.g. `device="H200"`'):
        explain(*meta_inputs())
    for wrong in ("H20", "h200", "", 90, ["H200"], torch.device("cuda")):
        with pytest.raises(ValueError) as caught:
            explain(*meta_inputs(), device=wrong)
        assert str(caught.value) == (
            '`device` must be "H100", "H200", "A100", "B200", "MI300X" or "cuda" for the present GPU, or facts of your '
            f"own (see explain), got {wrong!r}"
        )
    with pytest.raises(ValueError, match=r"`kv_lens` must lie between 0 and N = 4096"):
        report(kv_lens=torch.tensor([1, 5000]))
    with pytest.raises(TypeError):
        explain(*meta_inputs(), device="H200", colour="red")


def test_a_cache_that_the_device_cannot_read_is_refused_as_in_a_call():
    query, key, value = meta_inputs()
    cache = key.to(torch.float8_e4m3fn), value.to(torch.float8_e4m3fn)
    message = "float8_e4m3fn caches need an NVIDIA GPU of compute capability 8.9 or later, got cuda 80"
    with pytest.raises(ValueError, match=message):
        explain(query, *cache, device="A100")
    assert explain(query, *cache, device="H100").schedule is not None
    assert explain(query, key.to(torch.float8_e5m2), value.to(torch.float8_e5m2), device="A100").schedule is not None


# --- Devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "facts", "limit"),
    [
        (
            "H100",
            "cuda 90, 132 multiprocessors",
            "20.0 us to read this at 3.35 TB/s (of the fact sheet; a kernel reaches less)",
        ),
        ("H200", "cuda 90, 132 multiprocessors", "14.6 us to read this at 4.6 TB/s (measured)"),
        (
            "A100",
            "cuda 80, 108 multiprocessors",
            "32.9 us to read this at 2.04 TB/s (of the fact sheet; a kernel reaches less)",
        ),
        (
            "B200",
            "cuda 100, 148 multiprocessors",
            "8.4 us to read this at 8.0 TB/s (of the fact sheet; a kernel reaches less)",
        ),
        (
            "MI300X",
            "hip gfx942, 304 multiprocessors",
            "12.7 us to read this at 5.3 TB/s (of the fact sheet; a kernel reaches less)",
        ),
    ],
)
def test_devices_that_are_known_by_name(name, facts, limit):
    found = explain(*meta_inputs(B=16), device=name)
    assert found.read_bytes == 1 << 26
    assert f"\n  device    {name}: {facts}\n" in str(found)
    assert f"\n  limit     {limit}\n" in str(found)
    assert found.schedule.tiles.descriptors == (name in ("H100", "H200", "B200"))


def test_a_device_of_the_users_own_has_no_limit():
    found = explain(*meta_inputs(), device=DeviceFacts("cuda", 89, num_sms=128, shared_memory=101376))
    assert "device    given by its facts: cuda 89, 128 multiprocessors\n" in str(found)
    assert found.bandwidth is None and found.limit_us is None and "limit" not in str(found)


class TestThePresentGpu:
    """What PyTorch says of a GPU is invented here."""

    @pytest.fixture
    def gpu(self, monkeypatch):
        def install(name):
            facts = DeviceFacts("cuda", 90, num_sms=114, shared_memory=232448)
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: name)
            monkeypatch.setattr("flexdecode.call.device.device_facts", lambda place: facts)

        return install

    def test_cuda_names_it(self, gpu):
        gpu("NVIDIA H200")
        found = explain(*meta_inputs(), device="cuda")
        assert "device    NVIDIA H200: cuda 90, 114 multiprocessors\n" in str(found)
        assert "TB/s (measured)" in str(found)

    @pytest.mark.parametrize("name", ["NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB"])
    def test_other_models_have_other_bandwidths(self, gpu, name):
        gpu(name)
        assert explain(*meta_inputs(), device="cuda").bandwidth is None

    def test_without_one(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError) as caught:
            explain(*meta_inputs(), device="cuda")
        assert str(caught.value) == (
            '`device="cuda"` is the present GPU, and PyTorch finds none: name one of "H100", "H200", "A100", "B200", '
            '"MI300X"'
        )


# --- Notebooks --------------------------------------------------------------------------------------------------------


def test_repr_is_the_report():
    found = report(mods.causal())
    assert repr(found) == str(found) and "mask_mod causal" in repr(found)


def test_html_has_the_report_and_the_picture():
    pytest.importorskip("matplotlib")
    html = report(mods.sliding_window(100), mods.alibi(8))._repr_html_()
    assert "(kv_idx &lt;= q_idx) &amp; (q_idx - kv_idx &lt; window)" in html
    text = re.sub(r"<[^>]*>", "\n", html)
    lines = {unescape(line) for line in text.splitlines()}
    assert set(str(report(mods.sliding_window(100), mods.alibi(8))).splitlines()) - {"", "  graph"} <= lines
    assert html.count("<img") == 1 and 'src="data:image/png;base64,' in html
    assert "http" not in html and "<script" not in html
    # Nothing sets a colour of text or ground, apart from the white ground of the picture.
    assert re.findall(r"(?:color|background):([^;\"]*)", html) == ["transparent", "inherit"] * html.count("<pre") + [
        "white"
    ]


def test_html_escapes_names_and_values():
    def mod(b, h, q_idx, kv_idx):
        return kv_idx <= q_idx

    mod.__name__ = "<script>alert('&')</script>"
    found = report(mod)
    assert "<script" not in found._repr_html_()
    assert "mask_mod &lt;script&gt;alert(&#x27;&amp;&#x27;)&lt;/script&gt;" in found._repr_html_()


def test_a_page_of_its_own(tmp_path):
    def mod(b, h, q_idx, kv_idx):
        return kv_idx <= q_idx

    mod.__name__ = "<b>"
    found = report(mod)
    found.save_page(tmp_path / "step.html")
    text = (tmp_path / "step.html").read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>") and "<title>&lt;b&gt;</title>" in text
    assert "color-scheme: light dark" in text and found._repr_html_() in text


def test_png_for_notebooks(monkeypatch):
    pytest.importorskip("matplotlib")
    assert report(mods.causal())._repr_png_().startswith(b"\x89PNG")
    unknown = report(kv_lens=torch.empty(2, dtype=torch.int32, device="meta"))
    assert unknown._repr_png_() is None and "<img" not in unknown._repr_html_()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = report(mods.causal())
    assert found._repr_png_() is None and "<img" not in found._repr_html_() and "mask_mod causal" in found._repr_html_()


# --- Picture ----------------------------------------------------------------------------------------------------------


def test_cells_follow_the_blocks():
    found = report(mods.sliding_window(1000), kv_lens=torch.tensor([4096, 300]), options=DecodeOptions(block_n=64))
    codes, items, blocks = cells(found.step)
    assert (items, blocks) == (1, 1)
    for item in range(found.step.num_items):
        states, splits = found.step.blocks(item)
        assert torch.equal(codes[item] // 2, states)
        assert torch.equal(codes[item] % 2, splits.clamp(min=0) % 2)


@pytest.mark.parametrize(("B", "Hkv", "N"), [(64, 8, 4096), (200, 3, 4096), (3, 37, 100_000), (1, 1, 131_072)])
def test_cells_of_many_items_and_blocks(B, Hkv, N):
    found = explain(*meta_inputs(B, Hkv, Hkv, N=N), mask_mod=mods.sliding_window(64), device="H200")
    codes, items, blocks = cells(found.step)
    assert codes.shape[0] <= MAX_ROWS and codes.shape[1] <= MAX_COLUMNS
    assert codes.shape[0] * items >= B * Hkv and codes.shape[1] * blocks >= found.step.num_blocks
    assert Hkv % items == 0 or items % Hkv == 0  # no row has parts of two sequences
    assert (codes[:, -1] // 2 >= PARTIAL).all()  # a narrow window stays visible


def test_the_picture_has_the_colours_of_what_is_read(tmp_path):
    pytest.importorskip("matplotlib")
    import matplotlib.image

    def share(image, colour):
        wanted = torch.tensor(matplotlib.colors.to_rgb(colour))
        return float(((image[..., :3] - wanted).abs().amax(-1) < 0.02).float().mean())

    def colours(mask_mod, **arguments):
        path = tmp_path / "step.png"
        report(mask_mod, **arguments).save_picture(path)
        image = torch.from_numpy(matplotlib.image.imread(path).copy())
        assert image.shape[0] > 200 and image.shape[1] > 1000
        return {(state, shade): share(image, c) for state, pair in COLOURS.items() for shade, c in enumerate(pair)}

    window = colours(mods.sliding_window(1024), kv_lens=torch.tensor([4000, 2500]))
    assert window[DEAD, 0] > 0.15
    assert all(window[state, shade] > 0.001 for state in (PARTIAL, FULL) for shade in (0, 1))
    nothing = colours(None)
    assert nothing[FULL, 0] > 0.15 and nothing[FULL, 1] > 0.15 and nothing[DEAD, 0] < 0.01
    document = colours(mods.document(torch.zeros(2, 4096, dtype=torch.int32)))
    assert document[PARTIAL, 0] > 0.15 and document[FULL, 0] < 0.01


def test_pictures_of_little(tmp_path):
    pytest.importorskip("matplotlib")
    for name, found in {
        "nothing live": report(lambda b, h, q_idx, kv_idx: kv_idx < 0),
        "no keys": report(kv_lens=torch.zeros(2, dtype=torch.int32)),
        "one block": explain(*meta_inputs(1, 1, 1, N=5), device="H200"),
    }.items():
        found.save_picture(str(tmp_path / f"{name}.png"))
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_the_suffix_decides_the_kind_of_picture(tmp_path, name, start):
    pytest.importorskip("matplotlib")
    explain(*meta_inputs(1, 1, 1, N=5), device="H200").save_picture(tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(start)


@pytest.mark.parametrize("name", ["a.jpg", "a", "png", "a.svgz"])
def test_other_suffixes(tmp_path, name):
    with pytest.raises(ValueError) as caught:
        explain(*meta_inputs(1, 1, 1, N=5), device="H200").save_picture(tmp_path / name)
    assert str(caught.value) == f"`path` must end in .png, .svg or .pdf, got {str(tmp_path / name)!r}"


def test_a_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"save_picture needs matplotlib: `pip install flexdecode\[bench\]`"):
        report().save_picture(tmp_path / "step.png")


def test_import_is_light():
    code = "import sys, flexdecode; print(*(m for m in ('sympy', 'matplotlib', 'typer', 'rich') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


READS = "also keys in there that it rules out: they have to be finite, not NaN or inf"


@pytest.mark.parametrize(
    ("kind", "mod", "reads"),
    [
        ("mask_mod", mods.causal(), False),
        ("mask_mod", mods.sliding_window(16), False),
        ("mask_mod", mods.streaming(4, 16), False),
        ("mask_mod", mods.document(torch.zeros(2, 4096, dtype=torch.int32)), True),
        ("mask_mod", mods.dilated(64, 2), True),
        ("mask_mod", lambda b, h, q_idx, kv_idx: kv_idx < 0, False),
        ("score_mod", mods.alibi(8), False),
        ("score_mod", lambda score, b, h, q_idx, kv_idx: torch.where(kv_idx % 2 == 0, score, -torch.inf), True),
    ],
)
def test_mods_that_read_what_they_rule_out_are_named(kind, mod, reads):
    query, key = torch.empty(2, 8, 1, 64, device="meta"), torch.empty(2, 2, 4096, 64, device="meta")
    report = getattr(explain(query, key, key, device="H200", **{kind: mod}), kind)
    assert report.reads_dead_keys == reads and (READS in str(report)) == reads


def test_shapes_beside_a_block_mask_and_lengths_with_values():
    """Only query, key and value have to be on the meta device."""
    block_mask = create_block_mask(mods.causal(), None, None, 64, 64, device="cpu", BLOCK_SIZE=32)
    query, key, value = (torch.empty(2, heads, n, 32, device="meta") for heads, n in ((4, 1), (2, 64), (2, 64)))
    given = {"kv_lens": torch.tensor([5, 64]), "q_lens": torch.tensor([1, 0]), "sinks": torch.zeros(4)}
    found = explain(query, key, value, block_mask=block_mask.to("meta"), device="H200", **given)
    assert found.unknown == "the lists of `block_mask` say which blocks are read"


def test_dtypes_of_caches_and_parts_of_heads():
    query, key, value = meta_inputs()
    text = str(explain(query, key.half(), value.float(), device="H200"))
    assert "KV loads  by tensor descriptors, keys in float16, values in float32\n" in text
    text = str(explain(query, key.half(), value.half(), device="H200"))
    assert "KV loads  by tensor descriptors, float16\n" in text
    wide = explain(*meta_inputs(D=640), device="H200")
    assert "KV loads  by pointers, in parts of 128 columns of keys and 256 of values\n" in str(wide)
    assert wide.schedule.tiles.block_m == 16
