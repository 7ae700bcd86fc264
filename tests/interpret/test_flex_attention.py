"""`flex_attention` of flexdecode.integrations by the generated kernel; the largest scores of every kind of call."""

import pytest
import torch
from flex_cases import CASES, SCORE_MODS, Sizes, check, check_paged, inputs_of, run_case, up_to
from packed_cases import draw
from support import make_inputs, paged

from flexdecode import DecodeOptions, mods
from flexdecode.call.inputs import Inputs
from flexdecode.call.signature import Aux
from flexdecode.integrations import flex_attention
from flexdecode.runtime.request import read_request
from flexdecode.runtime.run import run_request

SIZES = Sizes(B=2, HQ=4, HKV=2, Q=1, N=70, D=16)
KERNEL = {"BACKEND": "TRITON", "BLOCK_N": 16}
of_splits = pytest.mark.parametrize("splits", [1, 3])


# --- The drop-in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    run_case(name, SIZES, torch.float32, kernel_options=KERNEL | {"SPLIT_KV": 2})


@pytest.mark.parametrize("name", ["composed", "offset_mask", "mask_of_heads", "window_by_both"])
def test_cases_in_pages(name):
    run_case(name, SIZES, torch.float32, page_size=16, kernel_options=KERNEL)


@pytest.mark.parametrize("name", SCORE_MODS)
def test_score_mods(name):
    check(inputs_of(SIZES, torch.float16), SCORE_MODS[name], kernel_options=KERNEL)
    check_paged(SIZES, torch.float16, SCORE_MODS[name], None, page_size=16, kernel_options=KERNEL)


@of_splits
@pytest.mark.parametrize("block_size", [16, 32, (1, 16)], ids=str)
def test_block_sizes(block_size, splits):
    sizes = SIZES._replace(Q=5, DV=24)
    options = KERNEL | {"SPLIT_KV": splits}
    check(
        inputs_of(sizes, torch.float32), SCORE_MODS["alibi"], up_to(20), block_size=block_size, kernel_options=options
    )


def test_one_cache_for_all_sequences():
    check(inputs_of(SIZES._replace(BKV=1), torch.float32), SCORE_MODS["distance"], kernel_options=KERNEL)


@of_splits
def test_the_output_has_the_order_of_the_query(splits):
    query, key, value = inputs_of(SIZES._replace(Q=3, DV=24), torch.float32)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    out = check((query, key, value), SCORE_MODS["alibi"], kernel_options=KERNEL | {"SPLIT_KV": splits})
    assert out.transpose(1, 2).is_contiguous()


def test_in_a_region():
    torch._dynamo.reset()
    attend = torch.compile(flex_attention, fullgraph=True, backend="aot_eager")
    check(
        inputs_of(SIZES._replace(Q=3), torch.float32),
        SCORE_MODS["alibi"],
        up_to(9),
        attention=attend,
        kernel_options=KERNEL,
    )


# --- The largest scores -----------------------------------------------------------------------------------------------


def attend(backend, query, key, value, score_mod, mask_mod, arguments, **options):
    """Output, log-sum-exp and largest scores."""
    options = DecodeOptions(backend=backend, **options)
    request = read_request(Inputs(query, key, value, **arguments), score_mod, mask_mod, options=options)
    return run_request(request, Aux(lse=True, max_scores=True), options)


def same_as_torch(*call, **options):
    """The kernel gives the largest scores that the torch backend gives."""
    found, expected = attend("triton", *call, block_n=16, **options), attend("torch", *call)
    assert (found.max_scores.isinf() == expected.max_scores.isinf()).all()
    torch.testing.assert_close(found.max_scores, expected.max_scores)
    torch.testing.assert_close(found.lse, expected.lse)
    assert expected.max_scores.isfinite().any()
    return found.max_scores


SCHEDULES = {
    "one split": {"num_splits": 1},
    "splits": {"num_splits": 3},
    "balanced": {"schedule": "balanced", "num_splits": 3},
    "invariant": {"batch_invariant": True},
}
of_schedules = pytest.mark.parametrize("options", SCHEDULES.values(), ids=SCHEDULES)


@of_schedules
def test_lengths_sinks_and_rows_without_keys(options):
    """Sinks are no scores; a row past `q_lens` and a row without a key have -inf."""
    query, key, value = make_inputs(3, 4, 2, 3, 70, 16)
    arguments = {
        "kv_lens": torch.tensor([70, 0, 33]), "q_lens": torch.tensor([2, 3, 1]), "sinks": torch.full((4,), 50.0),
    }  # fmt: skip
    found = same_as_torch(query, key, value, mods.softcap(2.0), mods.causal(), arguments, **options)
    assert (found[0, :, 2] == -torch.inf).all() and (found[1] == -torch.inf).all() and found[0, :, :2].max() <= 2.0


@of_schedules
def test_pages_and_scales(options):
    query, key, value = make_inputs(2, 4, 2, 1, 64, 16)
    key, value = ((20 * x).round().to(torch.int8) for x in (key, value))
    (key, table), (value, _) = paged(key, 16), paged(value, 16)
    arguments = {"page_table": table, "kv_lens": torch.tensor([64, 19]), "k_scale": 0.05, "v_scale": 0.1}
    same_as_torch(query, key, value, None, mods.sliding_window(30), arguments, **options)


@of_schedules
@pytest.mark.parametrize("q_lens", [(1, 3, 0), (1, 40, 2)], ids=str)
def test_packed_queries(q_lens, options):
    """Short and long sequences, whose tiles have different sizes; rows of no sequence have -inf."""
    call = draw(q_lens, (9, 70, 33), dtype=torch.float32, before=1)
    arguments = dict(call.arguments)
    key, value = arguments.pop("key"), arguments.pop("value")
    found = same_as_torch(call.query, key, value, mods.softcap(2.0), mods.causal(), arguments, **options)
    assert (found[:1] == -torch.inf).all() and (found[-2:] == -torch.inf).all()


def test_a_nan_and_an_infinity_reach_the_largest_score():
    def score_mod(score, b, h, q_idx, kv_idx):
        score = torch.where((h == 0) & (kv_idx == 20), float("nan"), score)
        return torch.where((h == 1) & (kv_idx == 20), float("inf"), score)

    found = attend("triton", *make_inputs(1, 4, 2, 1, 40, 16), score_mod, None, {}, num_splits=2).max_scores
    assert found[0, 0].isnan().all() and (found[0, 1] == torch.inf).all() and found[0, 2:].isfinite().all()
