"""Nothing outside of a tensor is read or written: each one lies between pages of memory that kill the process."""

import sys

import memory_cases as cases
import pytest
import torch

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory by mprotect"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),  # the interpreter's row maximum
]

OTHER_KERNEL = "latents"  # the kernel for many latents needs a Hopper GPU; here the general one would run


@pytest.mark.parametrize("name", [name for name in cases.CALLS if not name.startswith(OTHER_KERNEL)])
def test_calls(name):
    cases.check_call(cases.CALLS[name], "cpu")


@pytest.mark.parametrize("kind", ["contiguous", "pages of 1", "pages of 4", "pages of 16"])
@pytest.mark.parametrize("stored", [torch.float16, torch.int8], ids=str)
def test_appends(stored, kind):
    cases.check_append(kind, stored, "cpu")


@pytest.mark.parametrize(("num_parts", "v_head_dim"), [(2, 20), (9, 64), (3, 300)])
def test_merges(num_parts, v_head_dim):
    cases.check_merge(num_parts, v_head_dim, "cpu")
