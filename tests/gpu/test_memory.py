"""What `compute-sanitizer` is run on (see CONTRIBUTING.md); without it, ordinary tests.

Each template, each kind of cache and each schedule once, in small calls with nothing around their tensors.
"""

import memory_cases as cases
import pytest
import torch

from flexdecode import clear_cache
from flexdecode.call.schedule import Scheduler
from flexdecode.triton_api import has_gluon

pytestmark = pytest.mark.gpu


@pytest.fixture
def tiles(monkeypatch):
    """The tiles of the kernels that a test chooses."""
    made = []

    def choose(*arguments, original=Scheduler.choose):
        launches = original(*arguments)
        made.extend(launch.schedule.tiles for launch in launches)
        return launches

    clear_cache()
    monkeypatch.setattr(Scheduler, "choose", choose)
    yield made
    clear_cache()


@pytest.mark.parametrize("name", cases.CALLS)
def test_calls(name, tiles):
    call = cases.CALLS[name]
    capability = torch.cuda.get_device_capability()
    if call.stored == "e4m3" and capability < (8, 9):
        pytest.skip("this GPU has no float8_e4m3fn")
    if call.runs.get("latent") and capability[0] != 9:
        pytest.skip("the kernel for latents needs Hopper")
    if call.runs.get("latent") and not has_gluon():
        pytest.skip("the kernel for latents needs Gluon, which Triton has from 3.6 on")
    if call.runs.get("descriptors") and capability < (9, 0):
        pytest.skip("this GPU has no tensor descriptors")
    cases.check_call(call, "cuda")
    torch.cuda.synchronize()
    assert {field: getattr(tiles[-1], field) for field in call.runs} == call.runs


@pytest.mark.parametrize("name", cases.PACKED)
def test_packed_calls(name, tiles):
    cases.check_packed(name, "cuda")
    torch.cuda.synchronize()
    assert ("two launches" in name) == (len({one.block_m for one in tiles}) == 2)
    if name == "latents" and torch.cuda.get_device_capability()[0] == 9 and has_gluon():
        assert tiles[-1].latent


@pytest.mark.parametrize("kind", ["contiguous", "pages of 1", "pages of 4", "pages of 16"])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.int8, torch.float8_e5m2], ids=str)
def test_appends(stored, kind):
    cases.check_append(kind, stored, "cuda")


@pytest.mark.parametrize(("num_parts", "v_head_dim"), [(2, 20), (9, 64), (3, 300)])
def test_merges(num_parts, v_head_dim):
    cases.check_merge(num_parts, v_head_dim, "cuda")
