"""`warmup` and `load` without a GPU: calls on the CPU, and calls for a GPU whose kernels are stand-ins."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import flexdecode
from flexdecode import DecodeOptions, cache_info, flex_decode, mods, warmup
from flexdecode.ahead import loaded
from flexdecode.ahead.folder import Entry, MadeWith
from flexdecode.ahead.loaded import HelperLaunch, hash_of
from flexdecode.call.device import DeviceFacts
from flexdecode.codegen import kernels
from flexdecode.codegen.identity import COMBINE, SPLIT, identity_of
from flexdecode.runtime import ahead, prepare

H200 = DeviceFacts("cuda", 90, num_sms=132, shared_memory=227 * 1024)
QUERY, KEY, VALUE = torch.ones(2, 4, 1, 16), torch.ones(2, 2, 64, 16), torch.ones(2, 2, 64, 16)
META = [x.to("meta") for x in (QUERY, KEY, VALUE)]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(loaded, "_loaded", {})
    flexdecode.clear_cache()
    yield
    flexdecode.clear_cache()


def test_warming_up_prepares_the_call_on_the_cpu():
    warmup(QUERY, KEY, VALUE, mods.softcap(20.0), mask_mod=mods.sliding_window(7), return_lse=True)
    assert (cache_info().traces, cache_info().calls) == (2, 0)
    flex_decode(QUERY, KEY, VALUE, mods.softcap(30.0), mask_mod=mods.sliding_window(9), return_lse=True)
    assert (cache_info().traces, cache_info().hits) == (2, 1)


def test_warming_up_checks_the_call():
    with pytest.raises(ValueError, match="`value`"):
        warmup(QUERY, KEY, VALUE[:, :1])
    with pytest.raises(flexdecode.TraceError):
        warmup(*META, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= q_idx and kv_idx > 3)
    with pytest.raises(ValueError, match=r'`options\.backend="triton"` needs CUDA tensors'):
        warmup(*META, options=DecodeOptions(backend="triton"))


def test_warming_up_shapes_on_the_cpu_computes_nothing():
    warmup(*META, mods.alibi(4), kv_lens=torch.tensor([64, 3]))
    assert cache_info() == flexdecode.CacheInfo(traces=1)


# --- A GPU that is not there ------------------------------------------------------------------------------------------


class Launches:
    """Takes the place of the C helper."""

    def __init__(self):
        self.loaded, self.launched = [], []

    def load(self, backend, name, image, form, device, num_threads, shared, pdl):
        self.loaded.append((backend, name, image, form, device, num_threads, shared, pdl))
        return name

    def launch(self, kernel, grid_x, grid_y, stream, arguments):
        self.launched.append((kernel, grid_x, grid_y, stream, arguments))

    def encode(self, *of):
        return of


def register(entries, arch=90):
    """Registers a folder with kernels by what identifies them. Returns the stand-in for the C helper."""
    found = loaded.LoadedFolder.__new__(loaded.LoadedFolder)
    found.folder = SimpleNamespace(
        path=Path("somewhere"),
        made_with=MadeWith("0.1.0", "", "3.6.0", "Linux x86_64", "cuda", arch),
        entries={hash_of(identity): entry for identity, entry in entries.items()},
        read=lambda name: b"image of " + name.encode(),
    )
    found.launcher, found._launches = Launches(), {}
    loaded._loaded[f"folder for {arch}"] = found
    return found.launcher


@contextlib.contextmanager
def gpu():
    """The tensors of the CPU count as those of an H200; the kernels that calls ask for are listed."""
    asked = []

    def compile_pass(module, spec, facts, combine, when_read=None):
        asked.append((COMBINE if combine else SPLIT, spec))
        return SimpleNamespace(run=None)

    with (
        mock.patch.object(prepare, "device_facts", lambda device: H200),
        mock.patch.object(ahead, "device_facts", lambda device: H200),
        mock.patch.object(kernels, "compile_pass", compile_pass),
        mock.patch.object(kernels, "Launch", lambda compiled, *counts: compiled),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
    ):
        yield asked


def warm(*mods, **keywords):
    warmup(*META, *mods, options=DecodeOptions(backend="triton", num_splits=4), **keywords)


def entry(name, **more):
    return Entry(name, "signature", None, f"kernels/{name}", "sources/x.py", "P", 128, 0, True, [], ["out"], **more)


@pytest.fixture
def asked():
    """The specs of both passes of one call, and their identities."""
    found = []
    real = kernels.identity_of
    with (
        gpu(),
        mock.patch.object(loaded, "any_folder", lambda: True),
        mock.patch.object(kernels, "identity_of", lambda *of: found.append(real(*of)) or found[-1]),
    ):
        warm(mods.softcap(20.0))
    flexdecode.clear_cache()
    assert [text.split("\n")[0] for text in found] == [SPLIT, COMBINE]
    return found


def test_a_call_finds_its_kernels_in_a_folder(asked):
    launcher = register({asked[0]: entry(SPLIT), asked[1]: entry(COMBINE)})
    with gpu() as compiled, flexdecode.forbid_compilation():
        warm(mods.softcap(30.0))
        warm(mods.softcap(30.0))
    assert not compiled and cache_info().loads >= 2 and cache_info().compilations == 0
    assert [(name, image) for _, name, image, *_ in launcher.loaded] == [
        (SPLIT, b"image of kernels/decode_split"),
        (COMBINE, b"image of kernels/decode_combine"),
    ]


def test_kernels_stay_loaded_when_the_cache_is_cleared(asked):
    """A CUDA graph may hold them."""
    launcher = register({asked[0]: entry(SPLIT), asked[1]: entry(COMBINE)})
    with gpu():
        for _ in range(3):
            warm(mods.softcap(30.0))
            flexdecode.clear_cache()
    assert len(launcher.loaded) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda: warm(lambda score, b, h, q_idx, kv_idx: 2 * score),
        lambda: warm(mods.softcap(20.0), return_lse=True),
        lambda: warm(mods.softcap(20.0), kv_lens=torch.tensor([3, 4])),
        lambda: warm(mods.softcap(20.0), q_offset=3),
    ],
)
def test_another_call_does_not(asked, change):
    register({asked[0]: entry(SPLIT), asked[1]: entry(COMBINE)})
    with gpu() as compiled:
        with flexdecode.forbid_compilation(), pytest.raises(flexdecode.CompilationForbiddenError):
            change()
        change()
    assert SPLIT in [name for name, _ in compiled]


def test_a_folder_for_another_architecture_is_passed_over(asked):
    register({asked[0]: entry(SPLIT), asked[1]: entry(COMBINE)}, arch=80)
    with gpu() as compiled:
        warm(mods.softcap(20.0))
    assert len(compiled) == 2


def test_what_a_folder_refuses_is_not_tried(asked):
    """The next smaller tiles are asked for, as where the folder was written."""
    register({asked[0]: Entry(SPLIT, "", ("SharedMemoryError", "too large")), asked[1]: entry(COMBINE)})
    with gpu() as compiled:
        warm(mods.softcap(20.0))
    ((name, spec),) = [one for one in compiled if one[0] == SPLIT]
    assert (
        name == SPLIT and f"block_n={spec.tiles.block_n}," in repr(spec) and identity_of(SPLIT, spec, None) != asked[0]
    )
    assert f"block_n={2 * spec.tiles.block_n}," in asked[0]


def test_a_launch_hands_its_arguments_on():
    launcher = Launches()
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [64, 32]}
    of = Entry(SPLIT, "", None, "b", "s", "PTiillx", 128, 99, True, [meta, meta | {"elem_type": 7}])
    launch = HelperLaunch(launcher, of, b"image", "cuda", Path("s"), 3)
    assert launcher.loaded == [("cuda", SPLIT, b"image", "PTiillx", 3, 128, 99, 1)]
    launch((5, 6), 7, (8, 9))
    assert launcher.launched == [(SPLIT, 5, 6, 7, (8, 9))]
    described = SimpleNamespace(base=SimpleNamespace(data_ptr=lambda: 1024), shape=[100, 32], strides=[40, 1])
    first = (1024, 3, 2, 9, (64, 32), 100, 32, 40)
    second = (1024, 3, 2, 7, (64, 32), 100, 32, 40)
    assert launch.encode_descriptors(described, described) == (first, 100, 32, 40, 1, second, 100, 32, 40, 1)
