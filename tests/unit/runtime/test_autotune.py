"""`options.autotune`: which schedules are measured and when, what is kept, and where nothing is measured."""

import json
import os
import re
import threading

import pytest
import torch

from flexdecode import (
    DecodeOptions,
    allow_compilation,
    clear_cache,
    explain,
    flex_decode,
    forbid_compilation,
    mods,
    prepare,
    save_kernels,
    warmup,
)
from flexdecode.call.candidates import Choice, class_of, with_full_cache
from flexdecode.call.device import KNOWN_DEVICES, DeviceFacts
from flexdecode.call.inputs import Inputs, Sizes
from flexdecode.codegen.store import stored_files
from flexdecode.errors import CompilationForbiddenError, CompileError, SharedMemoryError
from flexdecode.runtime import autotune, launch
from flexdecode.runtime import prepare as preparing
from flexdecode.switch import is_forbidden

H200, _ = KNOWN_DEVICES["H200"]
AUTO = DecodeOptions(backend="triton", autotune=True)
PLAIN = DecodeOptions(backend="triton")


class Kernel:
    """Stands for a compiled kernel."""

    block_dv, of_small, pick = 64, False, None

    def __init__(self, spec, *_):
        self.spec = spec


class Gpu:
    """Calls go the way of a GPU up to the launch. Its clock is a function of the schedule.

    Attributes:
        launched: the schedules that were launched, those of measurements too.
        rounds: the schedules of each measurement.
        us: gives the microseconds of a schedule.
        refuse: tiles -> the error with which their kernel does not compile, or None.
        capturing: whether a CUDA graph is captured.
        calls: what they were launched with.
        compiled: the tiles of kernels.
        stepped: the tiles of the launches of prepared calls.
        is_full: whether there is no memory for a measurement.
    """

    def __init__(self, monkeypatch, facts=H200):
        self.launched, self.rounds, self.calls, self.compiled, self.stepped = [], [], [], [], []
        self.us, self.refuse, self.capturing, self.is_full = lambda schedule: 100.0, lambda tiles: None, False, False
        monkeypatch.setattr(preparing, "device_facts", lambda _: facts)
        monkeypatch.setattr(preparing, "find_kernel", self.find_kernel)
        monkeypatch.setattr(preparing, "find_combine", Kernel)
        monkeypatch.setattr("flexdecode.call.device.device_facts", lambda _: facts)
        monkeypatch.setattr(launch.TritonLauncher, "__call__", self.launch_of())
        monkeypatch.setattr(launch.TritonLauncher, "begin", lambda _: (0, None, None))
        monkeypatch.setattr(launch.TritonLauncher, "merge", lambda *_: None)
        monkeypatch.setattr(launch.FirstPass, "descriptors", lambda *_: None)
        monkeypatch.setattr(autotune, "_is_on_gpu", lambda query: not query.is_meta)
        monkeypatch.setattr(autotune, "_is_capturing", lambda: self.capturing)
        monkeypatch.setattr(autotune, "_device_name", lambda device: "a GPU")
        monkeypatch.setattr(autotune, "time_launches", self.time_launches)

    def launch_of(self):
        def launch(launcher, call):
            self.launched.append(launcher.first.chosen)
            self.calls.append(call)

        return launch

    def find_kernel(self, spec, facts, proven):
        if spec.tiles not in self.compiled and is_forbidden():
            raise CompilationForbiddenError("forbidden")
        if (error := self.refuse(spec.tiles)) is not None:
            raise error
        self.compiled.append(spec.tiles)
        kernel = Kernel(spec)
        kernel.run = lambda grid, stream, arguments: self.stepped.append(spec.tiles)
        return kernel

    def time_launches(self, runs, rounds, device):
        if self.is_full:
            raise torch.OutOfMemoryError("no memory")
        schedules = []
        for run in runs:
            run()
            schedules.append(self.launched[-1])
        self.rounds.append(schedules)
        return [self.us(schedule) for schedule in schedules]

    @property
    def chosen(self):
        """The schedule of the last call."""
        return self.launched[-1]


@pytest.fixture
def store(monkeypatch, tmp_path):
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def gpu(monkeypatch, store):
    clear_cache()
    yield Gpu(monkeypatch)
    clear_cache()


def tensors(length=4000, batch=2, heads=2, tokens=1, dim=128, dtype=torch.bfloat16):
    query = torch.zeros(batch, 4 * heads, tokens, dim, dtype=dtype)
    return (
        query,
        torch.zeros(batch, heads, length, dim, dtype=dtype),
        torch.zeros(batch, heads, length, dim, dtype=dtype),
    )


def default_of(*arguments, **keywords):
    """The schedule without autotuning."""
    return explain(*arguments, **keywords, options=PLAIN, device=H200).schedule


def eight_warps(schedule):
    """Faster with eight warps."""
    return 90.0 if schedule.tiles.num_warps == 8 else 100.0


# --- What is found ----------------------------------------------------------------------------------------------------


FASTEST = {
    "splits": lambda schedule: 1000.0 / schedule.num_splits if schedule.num_splits <= 100 else 200.0,
    "one split": lambda schedule: 50.0 if schedule.num_splits == 1 else 100.0,
    "keys": lambda schedule: 100.0 - schedule.tiles.block_n / 8,
    "warps": eight_warps,
    "stages": lambda schedule: 80.0 if schedule.tiles.num_stages == 2 else 100.0,
    "all": lambda schedule: (
        100.0
        - 20 * (schedule.num_splits == 66)
        - 15 * (schedule.tiles.block_n == 256)
        - 10 * (schedule.tiles.num_warps == 8)
        - 10 * (schedule.tiles.num_stages == 3)
    ),
}


@pytest.mark.parametrize("name", FASTEST)
def test_the_fastest_schedule_is_launched(gpu, name):
    gpu.us = FASTEST[name]
    flex_decode(*tensors(8000), options=AUTO)
    measured = {schedule for schedules in gpu.rounds for schedule in schedules}
    assert gpu.us(gpu.chosen) == min(map(gpu.us, measured)) < gpu.us(default_of(*tensors(8000)))
    if name == "all":
        assert gpu.us(gpu.chosen) == 45.0
    assert len(measured) <= 15 and len(set(gpu.compiled)) <= 12  # a kernel takes about a second to compile


def test_splits_fill_a_wave(gpu):
    """As many programs run on a multiprocessor at once as a wave has, and their tiles suit that."""
    flex_decode(*tensors(60000), options=AUTO)
    divided = {schedule.num_splits: schedule.tiles.per_sm for schedule in gpu.rounds[0]}
    assert divided == {33: 1, 1: 1, 16: 1, 66: 2, 99: 3, 132: 4}


def test_other_keys_per_step_get_stages_that_suit_them(gpu):
    flex_decode(*tensors(8000), options=AUTO)
    default, *others = gpu.rounds[1]
    assert [schedule.tiles.block_n for schedule in others] == [default.tiles.block_n // 2, 2 * default.tiles.block_n]
    for schedule in others:
        given = DecodeOptions(backend="triton", block_n=schedule.tiles.block_n)
        assert explain(*tensors(8000), options=given, device=H200).schedule == schedule
    assert len({schedule.tiles.num_stages for schedule in gpu.rounds[1]}) == 3


def test_at_the_end_only_the_next_numbers_of_programs_are_tried(gpu):
    gpu.us = FASTEST["all"]
    flex_decode(*tensors(8000), options=AUTO)
    *_, last_step, _ = gpu.rounds
    assert [schedule.num_splits for schedule in last_step] == [66, 33, 99]
    assert {(schedule.tiles.block_n, schedule.tiles.num_warps) for schedule in last_step} == {(256, 8)}


def test_all_kernels_of_a_step_are_started_before_one_is_waited_for(gpu, monkeypatch):
    happened, find = [], preparing.find_kernel

    def find_kernel(spec, *others):
        happened.append(("find", spec.tiles))
        return find(spec, *others)

    monkeypatch.setattr(preparing, "find_kernel", find_kernel)
    monkeypatch.setattr(preparing, "start_kernel", lambda spec, *_: happened.append(("start", spec.tiles)))
    flex_decode(*tensors(8000), options=AUTO)
    (verb, _), *steps = happened  # the default one alone
    assert verb == "find"
    first_step = {schedule.tiles for schedule in gpu.rounds[0][1:]} - {gpu.rounds[0][0].tiles}
    number = len(first_step)
    assert number > 2 and [verb for verb, _ in steps[: 2 * number]] == ["start"] * number + ["find"] * number
    assert {tiles for _, tiles in steps[:number]} == {tiles for _, tiles in steps[number : 2 * number]} == first_step


@pytest.mark.parametrize(("faster", "is_default"), [(0.0, True), (1.5, True), (2.5, False)])
def test_noise_keeps_the_default(gpu, faster, is_default):
    """A schedule has to be faster by more than 2%."""
    gpu.us = lambda schedule: 100.0 - faster * (schedule.tiles.num_warps == 8)
    flex_decode(*tensors(), options=AUTO)
    assert (gpu.chosen == default_of(*tensors())) is is_default


def test_a_chance_winner_is_found_out(gpu):
    """The default and the best one are measured once more."""
    seen = set()

    def first_time(schedule):
        is_new = schedule.tiles.num_warps == 8 and schedule not in seen
        seen.add(schedule)
        return 80.0 if is_new else 100.0

    gpu.us = first_time
    flex_decode(*tensors(), options=AUTO)
    assert [schedule.tiles.num_warps for schedule in gpu.rounds[-1]] == [4, 8]
    assert gpu.chosen == default_of(*tensors())


@pytest.mark.parametrize("error", [CompileError, SharedMemoryError, RuntimeError])
def test_a_candidate_that_fails_is_left_out(gpu, error):
    gpu.us = FASTEST["all"]
    gpu.refuse = lambda tiles: error("it does not fit") if tiles.num_warps == 8 or tiles.block_n == 256 else None
    flex_decode(*tensors(8000), options=AUTO)
    assert gpu.us(gpu.chosen) == 70.0
    measured = [schedule.tiles for schedules in gpu.rounds for schedule in schedules]
    assert all(tiles.num_warps == 4 and tiles.block_n < 256 for tiles in measured)


def test_a_default_that_fails_is_an_error(gpu):
    gpu.refuse = lambda tiles: CompileError("no such instruction")
    with pytest.raises(CompileError, match="no such instruction"):
        flex_decode(*tensors(), options=AUTO)


PINNED = {
    "num_splits": ({"num_splits": 3}, lambda s: s.num_splits),
    "block_n": ({"block_n": 32}, lambda s: s.tiles.block_n),
    "num_warps": ({"num_warps": 2}, lambda s: s.tiles.num_warps),
    "num_stages": ({"num_stages": 1}, lambda s: s.tiles.num_stages),
    "split": ({"schedule": "split"}, lambda s: "balanced" if s.tiles.balanced else "split"),
    "balanced": ({"schedule": "balanced"}, lambda s: "balanced" if s.tiles.balanced else "split"),
}


@pytest.mark.parametrize("name", PINNED)
def test_what_the_caller_chose_stays(gpu, name):
    given, read = PINNED[name]
    gpu.us = lambda schedule: 100.0 / (1 + len({s for r in gpu.rounds for s in r}))  # each one is faster than the last
    lens = torch.full((2,), 4000, dtype=torch.int32)
    flex_decode(*tensors(), kv_lens=lens, options=DecodeOptions(backend="triton", autotune=True, **given))
    measured = {schedule for schedules in gpu.rounds for schedule in schedules}
    assert {read(schedule) for schedule in measured} == set(given.values()) and len(measured) > 3


def test_tiles_of_an_amd_gpu_stay(monkeypatch, store):
    """LLVM ends the process where it compiles some tiles for them."""
    clear_cache()
    gpu = Gpu(monkeypatch, KNOWN_DEVICES["MI300X"][0])
    gpu.us = lambda schedule: 50.0 if schedule.num_splits == 1 else 100.0
    flex_decode(*tensors(), options=AUTO)
    sizes = {(tiles.block_n, tiles.num_warps, tiles.num_stages) for tiles in gpu.compiled}
    assert len(sizes) == 1 and gpu.chosen.num_splits == 1 and len(gpu.rounds[0]) > 2
    clear_cache()


def test_the_kernel_for_latents_keeps_its_tiles(gpu):
    query = torch.zeros(2, 128, 1, 576, dtype=torch.bfloat16)
    key = torch.zeros(2, 1, 4096, 576, dtype=torch.bfloat16)
    gpu.us = lambda schedule: 50.0 if schedule.num_splits == 1 else 100.0
    flex_decode(query, key, key[..., :512], options=AUTO)
    assert all(tiles.latent for tiles in gpu.compiled)
    assert gpu.chosen.num_splits == 1 and len(gpu.rounds[0]) > 2


def test_ragged_calls_try_both_ways_to_divide(gpu):
    lens = torch.tensor([30000, 100], dtype=torch.int32)
    gpu.us = lambda schedule: 50.0 if schedule.tiles.balanced and schedule.num_splits == 132 else 100.0
    big = tensors(40000, heads=8, dtype=torch.float16)
    assert default_of(*big, kv_lens=lens).tiles.balanced
    flex_decode(*big, kv_lens=lens, options=AUTO)
    assert {schedule.tiles.balanced for schedule in gpu.rounds[0]} == {True, False}
    assert gpu.chosen.tiles.balanced and gpu.chosen.num_splits == 132
    gpu.us = lambda schedule: 50.0 if schedule.tiles.balanced else 100.0
    lens = torch.tensor([3000, 100], dtype=torch.int32)
    assert not default_of(*tensors(), kv_lens=lens).tiles.balanced
    flex_decode(*tensors(), kv_lens=lens, options=AUTO)
    assert gpu.chosen.tiles.balanced
    flex_decode(*tensors(), options=AUTO)  # all lengths are the same
    assert not any(schedule.tiles.balanced for schedule in gpu.rounds[-1])


def test_all_results_of_a_measurement_go_to_memory_of_their_own(gpu):
    given = tensors()
    out = torch.empty(2, 1, 8, 128, dtype=torch.bfloat16).transpose(1, 2)
    flex_decode(*given, out=out, return_lse=True, options=AUTO)
    *trials, last = gpu.calls
    assert last.out is out and trials
    for trial in trials:
        assert trial.out.stride() == out.stride() and trial.out.data_ptr() != out.data_ptr()
        assert trial.lse.data_ptr() != last.lse.data_ptr() and trial.lse.shape == last.lse.shape
        assert trial.inputs[:3] == last.inputs[:3]


# --- Which calls share it ---------------------------------------------------------------------------------------------


def test_a_cache_that_grows_is_measured_once_for_each_doubling(gpu):
    gpu.us = eight_warps
    counts = []
    for length in (4000, 4001, 4050, 4096, 4097, 5000, 8192, 3000, 2049, 2048):
        before = len(gpu.rounds)
        flex_decode(*tensors(length), options=AUTO)
        counts.append(len(gpu.rounds) > before)
        assert gpu.chosen.tiles.num_warps == 8
    assert counts == [True, False, False, False, True, False, False, False, False, True]


def test_a_number_of_splits_is_kept_as_the_cache_grows(gpu):
    gpu.us = lambda schedule: 50.0 if schedule.num_splits == 33 else 100.0
    for length in (8192, 8000, 4097):
        flex_decode(*tensors(length), options=AUTO)
        assert gpu.chosen.num_splits == 33
    gpu.us = lambda schedule: 100.0 - schedule.num_splits
    flex_decode(*tensors(1024), options=AUTO)
    assert gpu.chosen.num_splits == 16  # shares of 64 keys
    flex_decode(*tensors(600), options=AUTO)
    assert gpu.chosen.num_splits == 10


def test_what_makes_another_kind_of_call(gpu):
    gpu.us = eight_warps
    lens = torch.full((2,), 4000, dtype=torch.int32)
    kinds = [
        (tensors(), {}),
        (tensors(batch=3), {}),
        (tensors(heads=4), {}),
        (tensors(tokens=2), {}),
        (tensors(dim=64), {}),
        (tensors(dtype=torch.float16), {}),
        (tensors(), {"kv_lens": lens}),
        (tensors(), {"mask_mod": mods.sliding_window(100)}),
        (tensors(), {"options": DecodeOptions(backend="triton", autotune=True, num_stages=2)}),
    ]
    for given, more in kinds:
        before = len(gpu.rounds)
        for _ in range(3):
            flex_decode(*given, **{"options": AUTO, **more})
        found = len(gpu.rounds) - before
        flex_decode(*given, **{"options": AUTO, **more}, out=torch.empty_like(given[0]))
        assert found > 0 and len(gpu.rounds) - before == found
    before = len(gpu.rounds)
    flex_decode(*tensors(), mask_mod=mods.sliding_window(200), options=AUTO)  # another number is no other mod
    flex_decode(*tensors(), return_lse=True, options=AUTO)
    assert len(gpu.rounds) == before


def packed(tokens, batch, length=4000, heads=2):
    ends = torch.arange(batch + 1, dtype=torch.int32) * (tokens // batch)
    ends[-1] = tokens
    query = torch.zeros(tokens, 4 * heads, 128, dtype=torch.bfloat16)
    caches = [torch.zeros(1, heads, length, 128, dtype=torch.bfloat16).expand(batch, -1, -1, -1).contiguous()] * 2
    return (query, *[x.clone() for x in caches]), {"cu_seqlens_q": ends, "kv_lens": torch.full((batch,), length)}


def test_packed_queries_of_similar_numbers_share_it(gpu):
    """The number of programs stays about the same."""
    gpu.us = lambda schedule: 50.0 if schedule.num_splits == 8 else 100.0
    measured, programs = [], []
    for batch in (8, 7, 6, 5, 4):
        given, more = packed(batch, batch, 512)
        before = len(gpu.rounds)
        flex_decode(*given, **more, max_q_len=1, options=AUTO)
        measured.append(len(gpu.rounds) > before)
        programs.append(batch * gpu.chosen.num_splits)
    assert measured == [True, False, False, False, True]
    assert programs[:4] == [8 * 8, 7 * 8, 6 * 8, 5 * 8]  # at most 8 shares of 64 keys each


def test_a_larger_batch_of_packed_queries_has_fewer_splits(gpu):
    gpu.us = lambda schedule: 50.0 if schedule.num_splits == 14 else 100.0
    for batch, splits in ((9, 14), (16, 7), (10, 12)):
        given, more = packed(batch, batch, 4096)
        flex_decode(*given, **more, max_q_len=1, options=AUTO)
        assert gpu.chosen.num_splits == splits


def test_prompts_of_similar_lengths_share_it(gpu):
    gpu.us = eight_warps
    counts = []
    for tokens in (5, 6, 8, 9, 16):
        before = len(gpu.rounds)
        flex_decode(*tensors(tokens=tokens), options=AUTO)
        counts.append(len(gpu.rounds) > before)
    assert counts == [True, False, False, True, False]


def test_two_launches_keep_their_schedules(gpu):
    given, more = packed(64 + 512, 2)
    more["cu_seqlens_q"] = torch.tensor([0, 64, 576], dtype=torch.int32)
    flex_decode(*given, **more, options=AUTO, max_q_len=512)
    assert not gpu.rounds
    assert "two launches" in explain(*given, **more, max_q_len=512, options=AUTO, device="H200").autotune


def test_classes():
    assert class_of(Sizes(3, 2, 4000, 1), False) == (3, 2, 4096, 1, 1)
    assert class_of(Sizes(3, 2, 4000, 5), False) == (3, 2, 4096, 8, 1)
    assert class_of(Sizes(3, 2, 4097, 5, 6), True) == (4, 2, 8192, 8, 8)


# --- What is kept -----------------------------------------------------------------------------------------------------


def record():
    (path,) = stored_files("schedules")
    return path


def test_another_process_reads_what_was_measured(gpu):
    gpu.us = eight_warps
    flex_decode(*tensors(), options=AUTO)
    rounds = len(gpu.rounds)
    clear_cache()
    flex_decode(*tensors(), options=AUTO)
    assert gpu.chosen.tiles.num_warps == 8 and len(gpu.rounds) == rounds
    kept = json.loads(record().read_text())
    assert kept["choice"]["num_warps"] == 8 and (kept["default_us"], kept["chosen_us"]) == (100.0, 90.0)


DAMAGES = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "no record": lambda text: "[]",
    "deep": lambda text: "[" * 100_000,
    "another call": lambda text: text.replace("torch.bfloat16", "torch.float16"),
    "an impossible value": lambda text: text.replace('"num_warps": 8', '"num_warps": 7'),
    "a word": lambda text: text.replace('"num_warps": 8', '"num_warps": "8"'),
    "an unknown option": lambda text: text.replace('"num_warps"', '"num_warp"'),
    "no time": lambda text: re.sub(r'"default_us": [\d.]+', '"default_us": NaN', text),
    "bytes": None,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_record_is_measured_anew(gpu, name):
    gpu.us = eight_warps
    flex_decode(*tensors(), options=AUTO)
    rounds, text = len(gpu.rounds), record().read_text()
    if DAMAGES[name] is None:
        record().write_bytes(b"\xff\x00\xfe")
    else:
        damaged = DAMAGES[name](text)
        assert damaged != text
        record().write_text(damaged)
    clear_cache()
    flex_decode(*tensors(), options=AUTO)
    assert gpu.chosen.tiles.num_warps == 8 and len(gpu.rounds) == 2 * rounds
    assert record().read_text() == text


@pytest.mark.parametrize("changed", ["device", "multiprocessors", "version", "digest", "triton"])
def test_another_device_or_version_measures_anew(gpu, store, monkeypatch, changed):
    flex_decode(*tensors(), options=AUTO)
    rounds = len(gpu.rounds)
    tuned = "flexdecode.codegen.tuned."
    if changed == "device":
        monkeypatch.setattr(autotune, "_device_name", lambda device: "another GPU")
    elif changed == "multiprocessors":
        monkeypatch.setattr(preparing, "device_facts", lambda _: DeviceFacts("cuda", 90, 66, H200.shared_memory))
    elif changed == "version":
        monkeypatch.setattr("flexdecode.codegen.store.__version__", "9.9")
    else:
        name = "sources_digest" if changed == "digest" else "triton_release"
        monkeypatch.setattr(tuned + name, lambda: "another")
    clear_cache()
    flex_decode(*tensors(), options=AUTO)
    assert len(gpu.rounds) > rounds and len(list((store / "index").iterdir())) == 2


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_to(gpu, store):
    store.mkdir(mode=0o500)
    gpu.us = eight_warps
    for length in (4000, 4001):
        flex_decode(*tensors(length), options=AUTO)
        assert gpu.chosen.tiles.num_warps == 8
    assert not stored_files("schedules") and gpu.rounds


def test_a_file_in_the_place_of_the_folder(gpu, store):
    store.write_text("no folder")
    gpu.us = eight_warps
    flex_decode(*tensors(), options=AUTO)
    rounds = len(gpu.rounds)
    flex_decode(*tensors(4001), options=AUTO)
    assert gpu.chosen.tiles.num_warps == 8 and len(gpu.rounds) == rounds


def test_too_little_memory(gpu):
    """The default is used, and only until the memory is cleared."""
    gpu.is_full, gpu.us = True, eight_warps
    for length in (4000, 4001):
        flex_decode(*tensors(length), options=AUTO)
        assert gpu.chosen == default_of(*tensors(length))
    assert not stored_files("schedules") and not gpu.rounds
    assert "nothing could be measured" in explain(*tensors(), options=AUTO).autotune
    gpu.is_full = False
    clear_cache()
    flex_decode(*tensors(), options=AUTO)
    assert gpu.chosen.tiles.num_warps == 8


# --- Where and when nothing is measured -------------------------------------------------------------------------------


def test_a_captured_graph_is_not_disturbed(gpu):
    gpu.us, gpu.capturing = eight_warps, True
    for length in (4000, 4000, 4000, 4001):
        flex_decode(*tensors(length), options=AUTO)
        assert gpu.chosen == default_of(*tensors(length))
    assert not gpu.rounds and not stored_files("schedules")
    gpu.capturing = False
    flex_decode(*tensors(), options=AUTO)
    assert gpu.chosen.tiles.num_warps == 8 and gpu.rounds
    gpu.capturing, rounds = True, len(gpu.rounds)
    for length in (4000, 4001, 4002):  # what is known is used
        flex_decode(*tensors(length), options=AUTO)
        assert gpu.chosen.tiles.num_warps == 8
    assert len(gpu.rounds) == rounds


def test_a_prepared_call_that_is_captured_first(gpu):
    gpu.us, gpu.capturing = eight_warps, True
    query, key, value = tensors()
    step = prepare(query, key, value, options=AUTO)
    step(query)
    assert not gpu.rounds and gpu.chosen == default_of(*tensors())
    gpu.capturing = False
    step(query)
    rounds = len(gpu.rounds)
    assert rounds and gpu.chosen.tiles.num_warps == 8
    step(query)
    assert [tiles.num_warps for tiles in gpu.stepped] == [8] and len(gpu.rounds) == rounds


def test_where_compilation_is_forbidden(gpu):
    gpu.us = eight_warps
    flex_decode(*tensors(), options=PLAIN)
    with forbid_compilation():
        flex_decode(*tensors(), options=AUTO)
        assert gpu.chosen == default_of(*tensors()) and not gpu.rounds
    with allow_compilation():
        clear_cache()
        flex_decode(*tensors(), options=AUTO)
    assert gpu.chosen.tiles.num_warps == 8
    clear_cache()
    rounds = len(gpu.rounds)
    with forbid_compilation():
        flex_decode(*tensors(), options=AUTO)  # what is known is used
        assert gpu.chosen.tiles.num_warps == 8
        clear_cache()
        gpu.compiled = [tiles for tiles in gpu.compiled if tiles.num_warps == 4]  # but not if its kernel is missing
        flex_decode(*tensors(), options=AUTO)
        assert gpu.chosen == default_of(*tensors())
    assert len(gpu.rounds) == rounds


def test_plans_with_and_without_it(gpu):
    gpu.us = eight_warps
    for _ in range(3):
        flex_decode(*tensors(), options=AUTO)
        assert gpu.chosen.tiles.num_warps == 8
        flex_decode(*tensors(), options=PLAIN)
        assert gpu.chosen.tiles.num_warps == 4


@pytest.mark.parametrize("way", ["warmup", "prepare"])
def test_what_measures_before_the_first_call(gpu, way):
    gpu.us = eight_warps
    query, key, value = tensors()
    step = (warmup if way == "warmup" else prepare)(query, key, value, options=AUTO)
    rounds = len(gpu.rounds)
    assert rounds
    if step is None:
        flex_decode(query, key, value, options=AUTO)
        assert gpu.chosen.tiles.num_warps == 8
    else:
        step(query)
        assert [tiles.num_warps for tiles in gpu.stepped] == [8]
    assert len(gpu.rounds) == rounds


def test_warmup_of_shapes(gpu, monkeypatch):
    """It cannot measure; what is known is compiled."""
    on_meta = [x.to("meta") for x in tensors()]
    monkeypatch.setattr("flexdecode.runtime.ahead.device_facts", lambda _: H200)
    monkeypatch.setattr("flexdecode.runtime.ahead.find_kernel", gpu.find_kernel)
    monkeypatch.setattr("flexdecode.runtime.ahead.find_combine", Kernel)
    warmup(*on_meta, options=AUTO)
    assert [tiles.num_warps for tiles in gpu.compiled] == [4] and not gpu.rounds
    gpu.us = eight_warps
    flex_decode(*tensors(), options=AUTO)
    rounds = len(gpu.rounds)
    gpu.compiled.clear()
    clear_cache()
    warmup(*on_meta, options=AUTO)
    assert [tiles.num_warps for tiles in gpu.compiled] == [8] and len(gpu.rounds) == rounds


def test_saved_kernels_are_those_of_the_default(gpu, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("flexdecode.runtime.ahead._prepare_shapes", lambda *arguments: seen.append(arguments[2]))
    monkeypatch.setattr("flexdecode.runtime.ahead.add_to_folder", lambda *arguments: None)
    save_kernels(tmp_path / "kernels", *tensors(), options=AUTO, device="H200")
    assert seen == [PLAIN]


def test_nothing_changes_on_the_torch_backend():
    query, key, value = (torch.randn(x.shape) for x in tensors(64))
    expected = flex_decode(query, key, value)
    assert torch.equal(flex_decode(query, key, value, options=DecodeOptions(autotune=True)), expected)
    assert not stored_files("schedules")


def test_the_options_are_checked():
    with pytest.raises(ValueError, match=r"`options.autotune` must be a bool, got 1"):
        DecodeOptions(autotune=1)
    text = "`options.autotune=True` and `options.batch_invariant=True` exclude one another"
    with pytest.raises(ValueError, match=re.escape(text)):
        DecodeOptions(autotune=True, batch_invariant=True)


def test_threads_measure_once(gpu):
    gpu.us = eight_warps
    flex_decode(*tensors(), options=AUTO)
    alone = len(gpu.rounds)
    gpu.rounds.clear()
    clear_cache()
    record().unlink()
    ready = threading.Barrier(4)

    def call():
        ready.wait()
        flex_decode(*tensors(), options=AUTO)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gpu.rounds) == alone


# --- The lengths that are measured ------------------------------------------------------------------------------------


def inputs_of(lens, capacity=1024, **more):
    query, key, value = tensors(capacity, batch=len(lens))
    return Inputs(query, key, value, torch.tensor(lens, dtype=torch.int32), **more)


@pytest.mark.parametrize(
    ("lens", "expected"),
    [([1, 2], [512, 1024]), ([0, 0], [1024, 1024]), ([0, 8], [0, 1024]), ([-5, 7], [0, 1024]), ([3, 1024], [3, 1024])],
)
def test_the_longest_sequence_fills_the_cache(lens, expected):
    found = with_full_cache(inputs_of(lens))
    assert found.kv_lens.tolist() == expected and found.kv_lens.dtype == torch.int32


def test_lengths_past_the_cache_stay():
    inputs = inputs_of([5, 5000])
    assert with_full_cache(inputs) is inputs


@pytest.mark.parametrize("name", ["kv_starts", "q_offset"])
def test_lengths_stay_where_the_caller_says_what_attends(name):
    inputs = inputs_of([5, 7], **{name: torch.zeros(2, dtype=torch.int32)})
    assert with_full_cache(inputs) is inputs


def test_pages_are_pages_of_the_pool():
    query, key, value = torch.zeros(2, 8, 1, 64), torch.zeros(10, 2, 16, 64), torch.zeros(10, 2, 16, 64)
    table = torch.full((2, 8), -1, dtype=torch.int32)
    table[:, 0] = torch.tensor([7, 9])
    found = with_full_cache(Inputs(query, key, value, torch.tensor([3, 5]), page_table=table))
    assert found.kv_lens.tolist() == [77, 128]
    assert found.page_table.shape == table.shape and found.page_table.dtype == table.dtype
    assert found.page_table.flatten().tolist() == [i % 10 for i in range(16)]
    assert table[0, 1] == -1


def test_a_measurement_fills_the_cache(gpu):
    lens = torch.tensor([10, 5], dtype=torch.int64)
    flex_decode(*tensors(), kv_lens=lens, options=AUTO)
    *trials, last = gpu.calls
    assert all(trial.inputs.kv_lens.tolist() == [4000, 2000] for trial in trials)
    assert last.inputs.kv_lens is lens


# --- What is said of it -----------------------------------------------------------------------------------------------


def test_explain(gpu):
    before = explain(*tensors(), options=AUTO)
    assert before.autotune == "not measured yet: this is the default schedule" and before.tuned is None
    assert "\n  autotune  not measured yet: this is the default schedule" in str(before)
    assert not gpu.rounds
    gpu.us = eight_warps
    flex_decode(*tensors(), options=AUTO)
    after = explain(*tensors(4050), options=AUTO)
    assert after.schedule.tiles.num_warps == 8 and after.tuned.choice == Choice(num_warps=8)
    assert "8 warps" in str(after)
    number = len(after.tuned.tried)
    assert f"autotune  num_warps=8: 90.0 us, the default 100.0 us; {number} schedules were measured" in str(after)
    assert "\n            100.0 us  the default" in str(after) and "\n            90.0 us  num_warps=8" in str(after)
    assert "autotune" not in str(explain(*tensors(), options=PLAIN, device="H200"))
    elsewhere = explain(*tensors(), options=AUTO, device="H200")
    assert elsewhere.schedule == default_of(*tensors())
    assert "only the present GPU can be measured" in elsewhere.autotune


def test_explain_where_the_default_is_the_fastest(gpu):
    flex_decode(*tensors(), options=AUTO)
    text = explain(*tensors(), options=AUTO).autotune
    assert re.fullmatch(r"the default is the fastest of \d+ schedules: 100\.0 us", text)


def test_it_is_silent_unless_asked(gpu, caplog, capsys):
    gpu.us = eight_warps
    flex_decode(*tensors(), options=AUTO)
    assert capsys.readouterr() == ("", "") and not caplog.records
    with caplog.at_level("INFO", logger="flexdecode"):
        flex_decode(*tensors(batch=3), options=AUTO)
    first, *_, last = [record.getMessage() for record in caplog.records]
    assert first.startswith("autotune: measuring schedules of a call of Sizes(batch=3, ")
    assert last.startswith("autotune: num_warps=8: 90.0 us, the default 100.0 us; ")
