"""`explain`: what a call reads, checks and launches, as a report for people."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .blocks import DEAD, FULL, PARTIAL, Step, find_step
from .compiled import module_path, template_files
from .device import find_target, without_autocast
from .identity import Mod
from .inputs import DEFAULT_OPTIONS, DecodeOptions, Inputs, check_all_lens
from .mod_report import ModReport, report_mod
from .prepare import choose_schedule, trace_call
from .program import Program
from .request import Request
from .schedule import BYTES_PER_US, DeviceFacts, Schedule
from .signature import Signature, shares_storage


@dataclass(frozen=True)
class Explanation:
    """What a call of `flex_decode` does; `print` it for the report.

    Attributes:
        shapes: of query, key and value.
        score_mod, mask_mod: what is known of each mod; None where the call has none.
        device: what the call runs on, in words.
        signature: what the kernel is specialised to.
        schedule: tiles and programs; None where no kernel is launched.
        step: the blocks that one decode step reads; None where they are not known.
        unknown: why `step` is None, else empty.
        cache_bytes: size of key and value.
        used_bytes: of the keys within `kv_lens` and their values; None where the lengths are not known.
        read_bytes: of the keys and values that one decode step reads, in whole blocks; None where not known.
        floor_us: microseconds in which the device can read that; None where its bandwidth is not known.
        source: file of the generated Triton module; None where no kernel is launched.
    """

    shapes: str
    score_mod: ModReport | None
    mask_mod: ModReport | None
    device: str
    signature: Signature
    schedule: Schedule | None
    step: Step | None
    unknown: str
    cache_bytes: int
    used_bytes: int | None
    read_bytes: int | None
    floor_us: float | None
    source: Path | None

    def __str__(self) -> str:
        mods = [str(mod) for mod in (self.score_mod, self.mask_mod) if mod is not None]
        sections = [self.shapes, *(mods or ["no mods: plain attention"]), self._memory(), self._schedule()]
        return "\n\n".join([*sections, *([f"source\n  {self.source}"] if self.source is not None else [])])

    def _memory(self) -> str:
        lines = ["KV bytes of one decode step", f"  cache     {_size(self.cache_bytes)}"]
        if self.used_bytes is not None:
            lines.append(f"  in use    {_size(self.used_bytes)}")
        if self.read_bytes is None:
            return "\n".join([*lines, f"  read      not known: {self.unknown}"])
        share = f", {100 * self.read_bytes / self.used_bytes:.1f}% of what is in use" if self.used_bytes else ""
        lines.append(f"  read      {_size(self.read_bytes)}{share}")
        if self.step is None:
            lines.append(f"            {self.unknown}")
        else:
            counts = self.step.counts
            kinds = f"{counts[FULL]} full, {counts[PARTIAL]} partial (checked key by key), {counts[DEAD]} dead"
            lines.append(f"  blocks    of {self.step.block_n} keys: {kinds} (never loaded)")
        if self.floor_us is not None:
            lines.append(f"  floor     {self.floor_us:.1f} us at {BYTES_PER_US / 1e6:.1f} TB/s")
        return "\n".join(lines)

    def _schedule(self) -> str:
        if self.schedule is None:
            return f"schedule\n  device    {self.device}"
        cut, tiles, signature = self.schedule, self.schedule.tiles, self.signature
        heads, tokens = signature.group_size, signature.num_queries
        item = "sequence, KV head" + (", row tile" if heads * tokens > tiles.block_m else "")
        used = f"{heads} query head{'s' * (heads > 1)} x {tokens} token{'s' * (tokens > 1)}"
        programs = f"{cut.num_items} ({item}) x {cut.num_splits} splits = {cut.num_programs}"
        if tiles.balanced:
            programs = f"{cut.num_programs} workers share {cut.num_items} ({item}) in equal runs of blocks"
        warps = f"{tiles.num_warps} warps, {tiles.num_stages} stages"
        rows = [
            ("device", self.device),
            ("tile", f"{tiles.block_m} query rows x {tiles.block_n} keys; {used} share a KV head"),
            ("", "9 warps in three groups, for latents" if tiles.latent else warps),
            ("KV loads", f"by {'tensor descriptors' if tiles.descriptors else 'pointers'}{_cache_kind(signature)}"),
            ("programs", programs + (_shares(self.step) if self.step is not None else "")),
            ("kernels", "decode_split, then decode_combine" if tiles.split else "decode_split"),
        ]
        return "\n".join(["schedule", *(f"  {label:<10}{text}" for label, text in rows)])

    def save_picture(self, path: str | PathLike[str]) -> None:
        """Draws the blocks of one decode step: full, partial and dead, by split.

        Args:
            path: the file to write, a PNG, SVG or PDF as its suffix says.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: the blocks are not known, or the suffix is another one.
        """
        if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
            raise ValueError(f"`path` must end in .png, .svg or .pdf, got {str(path)!r}")
        if self.step is None:
            raise ValueError(f"there are no blocks to draw: {self.unknown}")
        from .picture import draw

        names = [mod.name for mod in (self.score_mod, self.mask_mod) if mod is not None]
        draw(self.step, " and ".join(names) or "plain attention", Path(path))


@without_autocast()
def explain_request(request: Request, options: DecodeOptions | None, device: str | DeviceFacts | None) -> Explanation:
    """As `flexdecode.explain`, of arguments that are read already."""
    call = _check(request, options, device)
    inputs = call.inputs
    target = find_target(inputs.query.device, call.signature.backend, device)
    chosen, source = None, None
    if target.facts is not None and 0 not in inputs.out_shape:
        chosen, _ = choose_schedule(call.signature, inputs.sizes, inputs, call.program, target.facts, call.options)
        source = module_path(call.program, template_files(call.program, call.signature, chosen.tiles))
    step = _step(call, chosen)
    batch, num_kv_heads, _ = inputs.sizes
    used, read = None, None
    if call.kv_lens is not None:
        longest, total = (int(x) * num_kv_heads for x in (call.kv_lens.amax() if batch else 0, call.kv_lens.sum()))
        used = _bytes(inputs, lambda shared: longest if shared else total)
    if isinstance(step, Step):
        read = _bytes(inputs, step.keys_read)
    elif chosen is None:
        read = 0 if 0 in inputs.out_shape else used
    return Explanation(
        shapes=_shapes(*inputs[:3]),
        score_mod=report_mod("score_mod", call.program, call.mods[0]),
        mask_mod=report_mod("mask_mod", call.program, call.mods[1]),
        device=target.name,
        signature=call.signature,
        schedule=chosen,
        step=None if isinstance(step, str) else step,
        unknown=step if isinstance(step, str) else "",
        cache_bytes=_bytes(inputs, lambda shared: math.prod(inputs.key.shape[:3])),
        used_bytes=used,
        read_bytes=read,
        floor_us=None if read is None or target.bytes_per_us is None else read / target.bytes_per_us,
        source=source,
    )


class _Call(NamedTuple):
    """A checked call.

    Attributes:
        inputs: tensors and numbers.
        mods: the score_mod and the mask_mod.
        program: what is known of both.
        signature, options: of the call.
        kv_lens: keys in use, int64 [B]; None where they are not known.
        first_token: position of the first query token, int64 [B]; None where it is not known.
        num_tokens: query tokens, int64 [B]; None where they are not known.
    """

    inputs: Inputs
    mods: tuple[Mod, Mod]
    program: Program
    signature: Signature
    options: DecodeOptions
    kv_lens: torch.Tensor | None
    first_token: torch.Tensor | None
    num_tokens: torch.Tensor | None


def _check(request: Request, options: DecodeOptions | None, device: str | DeviceFacts | None) -> _Call:
    """Checks and traces a call as `flex_decode` does, except that only shapes matter on the meta device."""
    inputs, query = request.inputs, request.inputs.query
    options = DEFAULT_OPTIONS if options is None else options
    meta = getattr(query, "is_meta", False)
    if getattr(options, "backend", "") is None and (device is not None or meta):
        options = replace(options, backend="triton")
    # Query, key, value and out stay as they are: key and value may share memory.
    kept = ("query", "key", "value", "out")
    moved: dict[str, Any] = {
        name: x.to("meta")
        for name, x in inputs._asdict().items()
        if meta and isinstance(x, torch.Tensor) and name not in kept
    }
    place = torch.device("cpu") if meta else None
    mods = request.score, request.mask
    traced, mods = trace_call(inputs._replace(**moved), mods, False, options, request.listed, place)
    place, sizes = place or query.device, inputs.sizes
    lens, tokens = (
        _known(given, place) if isinstance(given, torch.Tensor) else torch.full((sizes.batch,), most, device=place)
        for given, most in ((inputs.kv_lens, sizes.max_kv_len), (inputs.q_lens, query.shape[2]))
    )
    check_all_lens(inputs._replace(kv_lens=lens, q_lens=tokens), replace(options, debug=True))
    lens, tokens = (None if x is None else x.to(torch.int64) for x in (lens, tokens))
    first = None if lens is None or tokens is None else lens - tokens
    if isinstance(inputs.q_offset, int):
        first = torch.full((sizes.batch,), inputs.q_offset, device=place)
    elif inputs.q_offset is not None:
        first = _known(inputs.q_offset, place)
        first = None if first is None else first.to(torch.int64).expand(sizes.batch)
    program, _ = traced.program(mods, sizes)
    return _Call(inputs, mods, program, traced.signature, options, lens, first, tokens)


def _known(tensor: torch.Tensor, place: torch.device) -> torch.Tensor | None:
    """The tensor where values are read; None if it has no values."""
    return None if tensor.is_meta else tensor.to(place)


def _step(call: _Call, chosen: Schedule | None) -> Step | str:
    """The blocks that a step reads, or why they are not known."""
    if chosen is None and call.signature.backend == "torch":
        return 'the torch backend reads every key; `device="H200"` explains for a GPU'
    if chosen is None:
        return "there is no query, so nothing is launched"
    if call.program.block_lists:
        return "the lists of `block_mask` say which blocks are read"
    for name, known in (("kv_lens", call.kv_lens), ("q_lens", call.num_tokens), ("q_offset", call.first_token)):
        if known is None:
            return f"`{name}` is on the meta device"
    assert call.kv_lens is not None and call.num_tokens is not None and call.first_token is not None
    # A sequence without a query token reads nothing.
    lens = call.kv_lens.where(call.num_tokens > 0, 0)
    at = lens, call.first_token, call.num_tokens
    step = find_step(call.program, call.mods, *at, call.signature, call.inputs.sizes, chosen)
    return f"`{step}` is on the meta device" if isinstance(step, str) else step


def _shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    names = ("query", query), ("key", key), ("value", value)
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in names)
    return f"flex_decode: {shapes}, {str(query.dtype).removeprefix('torch.')}"


def _bytes(inputs: Inputs, count: Callable[[bool], int]) -> int:
    """Bytes of keys, values and their scales, by how many keys there are; `count(True)` where sequences share them."""
    key, value, batch = inputs.key, inputs.value, inputs.query.shape[0]
    total = 0
    values_extra = not shares_storage(key, value)
    for cache, scale, own in ((key, inputs.k_scale, True), (value, inputs.v_scale, values_extra)):
        shared = inputs.page_table is None and cache.shape[0] != batch
        per_key = cache.shape[3] * cache.element_size() if own else 0
        if isinstance(scale, torch.Tensor) and scale.dim() == 3:
            per_key += scale.element_size()
        total += count(shared) * per_key
    return total


def _cache_kind(signature: Signature) -> str:
    """What is special about a cache."""
    pages = f", from pages of {signature.page_size}" if signature.page_size else ""
    dtype = str(signature.kv_dtype).removeprefix("torch.")
    return pages + (f", {dtype}" if signature.kv_dtype != signature.dtype else "")


def _shares(step: Step) -> str:
    """How the work is spread over the programs."""
    per_program = step.work_of_programs
    most, busy = int(per_program.max()), int((per_program > 0).sum())
    idle = "" if busy == len(per_program) else f"; {busy} have work"
    return f"{idle}, at most {most} block{'' if most == 1 else 's'} each"


def _size(number: int) -> str:
    """Bytes for people."""
    power = max(0, min(3, (number.bit_length() - 1) // 10))
    return f"{number / (1 << 10 * power):.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
