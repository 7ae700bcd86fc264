"""Score mods whose results are as large as float32 holds, for all tiers."""

import torch

LARGEST = torch.finfo(torch.float32).max
HUGE = torch.tensor(3e38).item()  # as float32 holds it, so that sinks and scores are equal
SCORES = {
    "three_at_3e38": lambda s, b, h, q, k: torch.where(k < 3, HUGE, s),
    "all_at_the_minimum": lambda s, b, h, q, k: torch.full_like(s, -LARGEST),
    "some_at_the_minimum": lambda s, b, h, q, k: torch.where(k % 2 == 0, -LARGEST, s),
    "both_ends": lambda s, b, h, q, k: torch.where(k == 7, LARGEST, -LARGEST),
    "all_at_minus_1e9": lambda s, b, h, q, k: s * 0.0 - 1e9,
    "all_at_1e6": lambda s, b, h, q, k: s * 0.0 + 1e6,
    "nearly_all_at_1e6": lambda s, b, h, q, k: torch.where(k < 100, 1e6, s),
}
SINKS = {"no_sinks": None, "sinks": torch.tensor([0.3, -1e9, 1e6, -torch.inf]), "huge_sinks": torch.full((4,), HUGE)}
INFINITE = {
    "one": lambda s, b, h, q, k: torch.where((k == 30) & (h != 1), torch.inf, s),
    "two_far_apart": lambda s, b, h, q, k: torch.where(((k == 3) | (k == 160)) & (h != 1), torch.inf, s),
}


def assert_infinite_rows(out, lse):
    """A score of +inf: the output is NaN and the log-sum-exp +inf, as in PyTorch; head 1 has none."""
    has = torch.arange(out.shape[1]) != 1
    assert out[:, has].isnan().all() and (lse[:, has] == torch.inf).all()
    assert out[:, ~has].isfinite().all() and lse[:, ~has].isfinite().all()
