"""Makes a failing case smaller, one argument after the other, while it fails in the same way."""

import ast
import re
from dataclasses import fields, replace

from .case import Captured, Case
from .check import check

_PLAIN = Case()
_FIRST = (
    "mask_mod", "score_mod", "block_mask", "options", "stored", "cache", "page_size", "dead", "packed", "q_lens",
    "q_offset", "sinks", "out_layout", "kv_lens",
)  # fmt: skip
_KEPT = ("backend", "device", "data", "captures", "live", "return_lse", "dtype")


def failure(case: Case) -> str | None:
    """The kind of failure: the type of the error and its first words without numbers; None if the case passes."""
    try:
        check(case)
    except Exception as error:
        return kind_of(error)
    return None


def kind_of(error: Exception) -> str:
    """The type of an error and its first words without numbers."""
    lines = str(error).splitlines() or [""]
    words = re.sub(r"\d+", "N", re.split(r"[:\[(]", lines[0])[0])
    return f"{type(error).__name__}: {words[:60].strip()}"


def shrink(case: Case, attempts: int = 300) -> Case:
    """The smallest case found that fails as `case` does."""
    wanted = failure(case)
    if wanted is None:
        return case
    changed = True
    while changed:
        changed = False
        for smaller in _smaller(case):
            attempts -= 1
            if attempts < 0:
                return case
            if failure(smaller) == wanted:
                case, changed = smaller, True
                break
    return case


def _smaller(case: Case):
    """Cases with one thing less."""
    names = [*_FIRST, *[f.name for f in fields(Case) if f.name not in (*_FIRST, *_KEPT)]]
    for name in names:
        if getattr(case, name) != getattr(_PLAIN, name):
            yield from _without(case, name)
    for name in case.dead:
        yield replace(case, dead=tuple(x for x in case.dead if x != name))
    for name in case.options:
        yield replace(case, options={k: v for k, v in case.options.items() if k != name})
    for kind in ("score_mod", "mask_mod"):
        text = getattr(case, kind)
        if text is not None:
            yield from (_tidy(replace(case, **{kind: part})) for part in _parts(text))
    for name, value in case.captures.items():
        plain = (
            replace(value, dtype="float32" if "float" in value.dtype else "int64", layout="contiguous")
            if isinstance(value, Captured)
            else 1
        )
        if plain != value and getattr(value, "dtype", "") != "bool":
            yield replace(case, captures=case.captures | {name: plain})
    if case.dtype != "float32":
        yield replace(case, dtype="float32")
    if case.N > 1 and case.page_size is None and case.kv_lens is None:
        yield replace(case, N=case.N // 2)


def _without(case: Case, name: str):
    """The case with one field as in a plain one, and what belongs to it."""
    plain = replace(case, **{name: getattr(_PLAIN, name)})
    if name == "B":
        for b in range(case.B):
            of_one = {n: (x[b],) for n in ("kv_lens", "q_lens", "q_offset") if isinstance(x := getattr(case, n), tuple)}
            yield replace(plain, **of_one)
    elif name in ("Hq", "Hkv"):
        yield replace(case, Hq=1, Hkv=1)
        yield replace(case, Hq=case.Hq // case.Hkv, Hkv=1)
        yield replace(case, Hq=case.Hkv, Hkv=case.Hkv)
    elif name == "Q" and case.q_lens is not None:
        yield replace(plain, q_lens=tuple(min(1, n) for n in case.q_lens))
    elif name == "kv_lens":
        if case.page_size is None and case.cache == "tensors":
            yield plain
        if len(set(case.kv_lens)) > 1:
            yield replace(case, kv_lens=(max(case.kv_lens),) * case.B)
    elif name == "N":
        if case.page_size is None and case.kv_lens is None:
            yield plain
        elif case.kv_lens is not None and max(case.kv_lens) < case.N and case.page_size is None:
            yield replace(case, N=max(case.kv_lens))
    elif name == "page_size":
        if case.cache == "tensors":
            yield replace(plain, shared_pages=0)
    elif name == "cache":
        yield plain
    elif name in ("D", "Dv") and case.latent:
        yield replace(case, D=16, Dv=16)
    elif name == "live":
        return
    elif name in ("score_mod", "mask_mod"):
        yield _tidy(replace(plain, live="" if name == "mask_mod" else case.live))
    else:
        yield plain


def _parts(text: str):
    """The expression with one part of it in place of the whole, or of a larger part."""
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        for name, child in ast.iter_fields(node):
            children = child if isinstance(child, list) else [child]
            for place, whole in enumerate(children):
                if not isinstance(whole, (ast.BinOp, ast.Call, ast.UnaryOp, ast.Compare)):
                    continue
                for part in ast.iter_child_nodes(whole):
                    if not isinstance(part, ast.expr) or isinstance(part, ast.Attribute):
                        continue
                    if isinstance(child, list):
                        child[place] = part
                    else:
                        setattr(node, name, part)
                    yield ast.unparse(tree)
                    if isinstance(child, list):
                        child[place] = whole
                    else:
                        setattr(node, name, whole)


def _tidy(case: Case) -> Case:
    """Without captures that no mod names."""
    texts = " ".join(filter(None, (case.score_mod, case.mask_mod, case.live)))
    return replace(case, captures={n: x for n, x in case.captures.items() if re.search(rf"\b{n}\b", texts)})
