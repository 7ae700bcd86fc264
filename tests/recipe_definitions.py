"""What the recipes of docs/recipes.md have to compute, as dense PyTorch operations, and how a recipe is run.

Each definition is written from the paper or the model, shares no code with the library or the recipe, and knows of the
recipe only the names of its tensors. It is computed in two dtypes: in float64 it is the truth, in float32 it shows how
far PyTorch itself is from the truth, which is what `assert_close_to_definition` allows a recipe (twice).
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from support import assert_close

from tests.docs.test_docs import read_steps, run_step

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"


# --- Running a recipe -------------------------------------------------------------------------------------------------


def read_recipes():
    """Code blocks of the page by heading; those before the first heading are under ""."""
    headings, inside = [(0, "")], False
    for number, line in enumerate(PAGE.read_text().splitlines()):
        inside ^= line.startswith("```")
        if not inside and (heading := re.match(r"## (.*)", line)):
            headings.append((number, heading[1]))
    recipes = {heading: [] for _, heading in headings}
    for step in read_steps(PAGE):
        recipes[[heading for number, heading in headings if number < step.code.start][-1]].append(step)
    return recipes


def run_recipe(heading, flex_decode=None, mistake=None):
    """Runs the blocks of a recipe, after those that it needs.

    Args:
        heading: of the recipe.
        flex_decode: takes the place of the library's function.
        mistake: a text of the recipe and what to write in its place.

    Returns:
        The names that the blocks leave, as attributes.
    """
    recipes, names = read_recipes(), {}
    if mistake is not None:
        recipes[heading] = [_with(mistake, step) for step in recipes[heading]]
    for part in ("", *NEEDS.get(heading, ()), heading):
        for step in recipes[part]:
            _, error = run_step(step, names)
            if error is not None:
                raise error
        if part == "" and flex_decode is not None:
            names["flex_decode"] = flex_decode
    return SimpleNamespace(**{name: x for name, x in names.items() if not name.startswith("__")})


def _with(mistake, step):
    right, wrong = mistake
    assert right in step.code.text, f"the recipe has no {right!r}"
    return replace(step, code=replace(step.code, text=step.code.text.replace(right, wrong)))


def assert_close_to_definition(heading, recipe):
    """Asserts that every result of a recipe is as good as PyTorch's own in float32, by the rule of all tests."""
    truth, measure = (RECIPES[heading].definition(_on_cpu(recipe, dtype)) for dtype in (torch.float64, torch.float32))
    for name, expected in truth.items():
        assert expected.isfinite().all()
        no_lse = torch.zeros(expected.shape[:-1])
        assert_close(getattr(recipe, name), None, (expected, no_lse), (measure[name], no_lse))


def largest_difference(heading, recipe):
    """The largest absolute difference of any result of a recipe from its definition in float64."""
    truth = RECIPES[heading].definition(_on_cpu(recipe, torch.float64))
    return max((getattr(recipe, name).cpu().double() - expected).abs().max().item() for name, expected in truth.items())


def _on_cpu(recipe, dtype):
    def convert(x):
        if isinstance(x, torch.Tensor):
            return x.cpu().to(dtype) if x.is_floating_point() else x.cpu()
        return type(x)(map(convert, x)) if isinstance(x, (list, tuple)) else x

    return SimpleNamespace(**{name: convert(x) for name, x in vars(recipe).items()}, dtype=dtype)


# --- Dense attention --------------------------------------------------------------------------------------------------


def dense(r, logit, *, query=None, scale=None, lens=None):
    """Softmax attention of the newest token of each sequence, one sequence and one head at a time.

    Args:
        r: the recipe, with `key`, `value` and `kv_lens`.
        logit: from the scaled product `[n]`, the numbers of sequence and head, the position of the query and those
            of the keys `[n]`, all the softmax sees; there may be more entries than keys, for which there is no value.
        query, scale, lens: where they are not the usual ones.
    """
    query, lens = r.query if query is None else query, r.kv_lens if lens is None else lens
    group, out = query.shape[1] // r.key.shape[1], torch.zeros(*query.shape[:3], r.value.shape[-1], dtype=r.dtype)
    for b, h in ((b, h) for b in range(query.shape[0]) for h in range(query.shape[1])):
        n = int(lens[b])
        k, v = r.key[b, h // group, :n], r.value[b, h // group, :n]
        product = (k @ query[b, h, 0]) * (query.shape[-1] ** -0.5 if scale is None else scale)
        weight = torch.softmax(logit(product, b, h, n - 1, torch.arange(n)), 0)
        out[b, h, 0] = weight[:n] @ v
    return out


def only(live, score):
    return torch.where(live, score, torch.tensor(-torch.inf, dtype=score.dtype))


# --- Definitions ------------------------------------------------------------------------------------------------------


def gpt_oss(r):
    def logit(score, b, h, i, j):
        return torch.cat([only(j > i - 128, score), r.sinks[h : h + 1]])

    return {"out": dense(r, logit)}


def gemma_2(r):
    def logit(score, b, h, i, j):
        return only(j > i - 128, 50 * torch.tanh(score / 50))

    return {"out": dense(r, logit, query=20 * r.query, scale=1 / 12)}


def llama_4(r):
    def in_chunks(score, b, h, i, j):
        return only(j >= i - i % 128, score)

    # transformers' model multiplies the query, before the product.
    steps = ((r.kv_lens - 1 + 1.0) / 64).floor().to(r.dtype)
    query = r.query * (torch.log(steps + 1) * 0.1 + 1)[:, None, None, None]
    return {
        "in_chunks": dense(r, in_chunks),
        "everywhere": dense(r, lambda score, b, h, i, j: score, query=query),
    }


def forgetting(r):
    def logit(score, b, h, i, j):
        return score + torch.stack([r.log_gate[b, h, first + 1 : i + 1].sum() for first in j])

    return {"out": dense(r, logit)}


def alibi(r):
    def logit(score, b, h, i, j):
        return score - (0.5 ** (h + 1)) * (i - j)  # 8 heads: 1/2, 1/4, ... 1/256

    return {"out": dense(r, logit)}


def kerple(r):
    return {
        "logarithmic": dense(r, lambda score, b, h, i, j: score - r.r1[h] * torch.log(1 + r.r2[h] * (i - j))),
        "power": dense(r, lambda score, b, h, i, j: score - r.r1[h] * torch.pow((i - j).to(r.dtype), r.r2[h])),
    }


def fire(r):
    def transformed(x):
        return torch.log(0.1 * torch.as_tensor(x, dtype=r.dtype) + 1)

    def logit(score, b, h, i, j):
        x = transformed(i - j) / transformed(max(i, 400))
        hidden = torch.nn.functional.linear(x[:, None], r.w1[:, None], r.b1).relu()
        return score + torch.nn.functional.linear(hidden, r.w2, r.b2)[:, h]

    return {"out": dense(r, logit)}


def t5(r):
    def bucket(distance):
        if distance < 16:
            return distance
        return min(31, 16 + int(math.log(distance / 16) / math.log(128 / 16) * 16 + 1e-9))

    def logit(score, b, h, i, j):
        return score + torch.stack([r.table[bucket(i - int(x)), h] for x in j])

    return {"out": dense(r, logit, scale=1.0)}


def heads_of_latents(r):
    """Keys `[B, H, N, 128 + 64]` and values `[B, H, N, 128]` of every head, expanded."""
    compressed, rotary = r.latent[..., :512], r.latent[..., 512:]
    keys = torch.cat([compressed @ r.w_key, rotary.expand(-1, r.H, -1, -1)], -1)
    return torch.cat([r.q_nope, r.q_rope], -1), keys, compressed @ r.w_value


def mla(r):
    query, keys, values = heads_of_latents(r)
    heads = SimpleNamespace(key=keys, value=values, kv_lens=r.kv_lens, dtype=r.dtype)
    return {"out": dense(heads, lambda score, b, h, i, j: score, query=query)}


def differential(r):
    out = torch.zeros(r.B, r.Hq, 1, 2 * r.D, dtype=r.dtype)
    for b, h in ((b, h) for b in range(r.B) for h in range(r.Hq)):
        n, kv_head = int(r.kv_lens[b]), h // (r.Hq // r.Hkv)
        first, second = (
            torch.softmax(r.keys[b, kv_head, :n, half] @ q[b, h, 0] / math.sqrt(r.D), 0)
            for q, half in ((r.q1, slice(0, r.D)), (r.q2, slice(r.D, 2 * r.D)))
        )
        out[b, h, 0] = (first - 0.3 * second) @ r.values[b, kv_head, :n]
    return {"out": out}


def draft_trees(r):
    """A draft attends as if its path were the whole continuation of the sequence."""
    out = torch.zeros(r.B, r.Hq, r.T, r.D, dtype=r.dtype)
    for b, h, draft in ((b, h, t) for b in range(r.B) for h in range(r.Hq) for t in range(r.T)):
        prefix, path = int(r.kv_lens[b]) - r.T, r.paths[draft]
        on_path = [prefix + r.paths.index(path[:depth]) for depth in range(len(path) + 1)]
        tokens = torch.tensor([*range(prefix), *on_path])
        k, v = (x[b, h // (r.Hq // r.Hkv), tokens] for x in (r.key, r.value))
        out[b, h, draft] = torch.softmax(k @ r.drafts[b, h, draft] / math.sqrt(r.D), 0) @ v
    return {"out": out}


def dsa(r):
    query, keys, values = heads_of_latents(r)
    out = torch.zeros(r.B, r.H, 1, 128, dtype=r.dtype)
    for b in range(r.B):
        n = int(r.kv_lens[b])
        index = sum(r.weight[b, j] * torch.relu(r.k_index[b, :n] @ r.q_index[b, j]) for j in range(r.Hi))
        chosen = index.argsort(descending=True)[:64]
        for h in range(r.H):
            weight = torch.softmax(keys[b, h, chosen] @ query[b, h, 0] / math.sqrt(192), 0)
            out[b, h, 0] = weight @ values[b, h, chosen]
    return {"out": out}


def nsa(r):
    out, n = torch.zeros(r.B, r.Hq, 1, r.D, dtype=r.dtype), r.length
    groups = [(b, g, range(g * r.G, (g + 1) * r.G)) for b in range(r.B) for g in range(r.Hkv)]
    for b, g, heads in groups:
        k, v = r.key[b, g, :n], r.value[b, g, :n]
        blocks = [range(start, min(start + 32, n)) for start in range(0, n, 32)]
        complete = [block for block in blocks if len(block) == 32]
        small_k, small_v = (torch.stack([r.mix @ x[list(block)] for block in complete]) for x in (k, v))
        weights = {h: torch.softmax(small_k @ r.query[b, h, 0] / math.sqrt(r.D), 0) for h in heads}
        # One initial and two local blocks are fixed; the others have the largest weight, summed over the group.
        total = sum(weights.values())
        fixed = {0, len(blocks) - 2, len(blocks) - 1}
        free = sorted((i for i in range(len(complete)) if i not in fixed), key=lambda i: -total[i])
        chosen = sorted(fixed | set(free[: r.top - len(fixed)]))
        tokens = torch.tensor([token for i in chosen for token in blocks[i]])
        for h in heads:
            q = r.query[b, h, 0] / math.sqrt(r.D)
            selected = torch.softmax(k[tokens] @ q, 0) @ v[tokens]
            near = torch.softmax(k[n - 64 :] @ q, 0) @ v[n - 64 :]
            gate = r.gates[:, b, h, 0, 0]
            out[b, h, 0] = gate[0] * (weights[h] @ small_v) + gate[1] * selected + gate[2] * near
    return {"out": out}


def cross_attention(r):
    def logit(score, b, h, i, j):
        return only((j >= r.step[b] - 10) & (j <= r.step[b] + 10), score)

    out = dense(r, logit, lens=r.source_lens)
    return {"out": out, "packed": out[:, :, 0]}


def beam_search(r):
    beams = [[x[0] for x in r.prompt] for _ in range(3)]
    for parents, k, v in r.history:
        new = [(k[place], v[place]) for place in range(3)]
        beams = [[torch.cat(both, 1) for both in zip(beams[p], new[i], strict=True)] for i, p in enumerate(parents)]
    stacked = SimpleNamespace(key=torch.stack([k for k, _ in beams]), value=torch.stack([v for _, v in beams]))
    stacked.kv_lens, stacked.dtype = torch.tensor([43, 43, 43]), r.dtype
    return {"out": dense(stacked, lambda score, b, h, i, j: score, query=r.q)}


# --- The recipes ------------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """The definition of a recipe, and mistakes that one could make in it: each a text and another in its place."""

    definition: object
    mistakes: tuple


NEEDS = {"DSA: DeepSeek-V3.2": ["MLA: DeepSeek-V2, DeepSeek-V3, Kimi K2"]}

RECIPES = {
    "GPT-OSS: sinks and a window": Recipe(gpt_oss, (("window(128)", "window(129)"), (", sinks=sinks", ""))),
    "Gemma 2: soft cap": Recipe(gemma_2, (("softcap(cap)", "softcap(30.0)"), (", scale=scale", ""))),
    "Llama 4: chunks and temperature": Recipe(
        llama_4, (("chunked(chunk)", "sliding_window(chunk)"), ("(q_idx + 1)", "q_idx"))
    ),
    "Forgetting Transformer": Recipe(forgetting, (("total[b, h, kv_idx]", "total[b, h, kv_idx - 1]"),)),
    "ALiBi": Recipe(alibi, (("alibi(Hq)", "alibi(2 * mods.alibi_slopes(Hq))"),)),
    "KERPLE": Recipe(kerple, (("log1p", "sqrt"), ("r2[h]\n", "r1[h]\n"))),
    "FIRE": Recipe(fire, (("min=threshold", "min=threshold + 60"), (" + b2[h]", " + b2[0] * kv_idx / 512"))),
    "T5": Recipe(t5, (("t5_bias(table)", "t5_bias(table, 64)"), (", scale=1.0", ""))),
    "MLA: DeepSeek-V2, DeepSeek-V3, Kimi K2": Recipe(mla, (("(nope + rope)", "(rank + rope)"),)),
    "Differential Transformer": Recipe(differential, (("second = flex_decode(q2", "second = flex_decode(q1"),)),
    "Draft trees: Medusa, EAGLE": Recipe(draft_trees, (("== above", "== above or len(above) == 1"),)),
    "DSA: DeepSeek-V3.2": Recipe(dsa, ((".relu()", ""), ("(B,), k)", "(B,), k - 1)"))),
    "NSA: native sparse attention": Recipe(
        nsa, (("[0, -1]", "[0, 1]"), ("length % size)", "0)"), ("kv_lens=whole", "kv_lens=whole + 1"))
    ),
    "Cross attention": Recipe(cross_attention, (("<= reach", "< reach"), (", q_offset=step,\n", ",\n"))),
    "Beam search": Recipe(beam_search, (("cache.fork(parent, place)", "cache.fork(2, place)"),)),
}
