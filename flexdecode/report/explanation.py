"""`explain`: what a call reads, checks and launches, as a report for people."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch

from ..analysis.algebra import Ends
from ..analysis.proven import ProvenMods
from ..call.checks import check_all_lens, check_device
from ..call.device import Bandwidth, DeviceFacts, Target, find_target, without_autocast
from ..call.inputs import DEFAULT_OPTIONS, DecodeOptions, Inputs
from ..call.schedule import Schedule, Scheduler
from ..call.signature import NO_AUX, Signature, shares_storage
from ..call.tiles import Loads
from ..codegen.kernels import module_path, template_files
from ..codegen.tuned import Tuned
from ..runtime.autotune import Known, known_choice
from ..runtime.identity import Mod
from ..runtime.prepare import allows_latents, trace_call
from ..runtime.request import Request
from .blocks import DEAD, FULL, PARTIAL, Step, find_step
from .mod_report import ModReport, report_mod
from .page import body, page
from .picture import count, draw


@dataclass(frozen=True, repr=False)
class Explanation:
    """What a call of `flex_decode` does; `print` and `repr` give the report, and notebooks show the picture too.

    Attributes:
        shapes: of query, key and value.
        score_mod, mask_mod: what is known of each mod; None if the call has none.
        device: what the call runs on, in words.
        signature: what the kernel is specialised to.
        num_queries: query tokens of a sequence.
        schedule: tiles and programs; None if no kernel is launched.
        step: the blocks that one decode step reads; None if they are not known, or if the query is packed.
        unknown: why `step` is None, else empty.
        cache_bytes: bytes of all keys and values of the cache.
        used_bytes: bytes of the keys within `kv_lens` and their values; None if the lengths are not known.
        read_bytes: bytes of the keys and values that one decode step reads, in whole blocks; None if not known.
        bandwidth: of the device, measured or of its fact sheet; None if it is not known.
        limit_us: microseconds that the device needs to read `read_bytes`; None if its bandwidth is not known.
        source: file of the generated Triton module; None if no kernel is launched.
        tuned: what `options.autotune` has measured of such calls on this device; None if nothing is known.
        autotune: the same in words; empty without that option.
    """

    shapes: str
    score_mod: ModReport | None
    mask_mod: ModReport | None
    device: str
    signature: Signature
    num_queries: int
    schedule: Schedule | None
    step: Step | None
    unknown: str
    cache_bytes: int
    used_bytes: int | None
    read_bytes: int | None
    bandwidth: Bandwidth | None
    limit_us: float | None
    source: Path | None
    tuned: Tuned | None = None
    autotune: str = ""

    @property
    def title(self) -> str:
        """The names of the mods."""
        names = [mod.name for mod in (self.score_mod, self.mask_mod) if mod is not None]
        return " and ".join(names) or "plain attention"

    @property
    def share_of_bytes(self) -> float | None:
        """The part of the bytes in use that a step reads, from 0 to 1; None if not known or if none are in use."""
        return None if self.read_bytes is None or not self.used_bytes else self.read_bytes / self.used_bytes

    @property
    def share_of_blocks(self) -> float | None:
        """The part of the blocks in use that a step reads, from 0 to 1; None if not known or if none are in use.

        Each tile of query rows has blocks of its own, and a block that is read in part counts as one. So this is
        another number than the share of the bytes.
        """
        return None if self.step is None else self.step.share_read

    def __str__(self) -> str:
        return "\n\n".join(self.sections())

    def __repr__(self) -> str:
        return str(self)

    def sections(self) -> list[str]:
        """The parts of the report: the shapes, each mod, the bytes, the schedule and the source."""
        mods = [str(mod) for mod in (self.score_mod, self.mask_mod) if mod is not None]
        source = [f"source\n  {self.source}"] if self.source is not None else []
        return [self.shapes, *(mods or ["no mods: plain attention"]), self._memory(), self._schedule(), *source]

    def _memory(self) -> str:
        lines = ["KV bytes of one decode step", f"  cache     {_size(self.cache_bytes)}"]
        if self.used_bytes is not None:
            lines.append(f"  in use    {_size(self.used_bytes)}")
        if self.read_bytes is None:
            return "\n".join([*lines, f"  read      not known: {self.unknown}"])
        share = "" if self.share_of_bytes is None else f", {100 * self.share_of_bytes:.1f}% of the bytes in use"
        lines.append(f"  read      {_size(self.read_bytes)}{share}")
        lines += [f"            {self.unknown}"] if self.step is None else self._blocks(self.step)
        if self.limit_us is not None:
            lines.append(f"  limit     {self.limit_us:.1f} us to read this at {self.bandwidth}")
        return "\n".join(lines)

    def _blocks(self, step: Step) -> list[str]:
        counts, share = step.counts, step.share_read
        read = f"{counts[FULL] + counts[PARTIAL]} of {sum(counts.values())} are read"
        read += "" if share is None else f", {100 * share:.1f}% of the blocks in use"
        kinds = (
            f"{counts[FULL]} full, {counts[PARTIAL]} partial (checked key by key), {counts[DEAD]} dead (never loaded)"
        )
        return [f"  blocks    of {step.block_n} keys: {read}", f"            {kinds}"]

    def _schedule(self) -> str:
        if self.schedule is None:
            return f"schedule\n  device    {self.device}"
        schedule, tiles, signature = self.schedule, self.schedule.tiles, self.signature
        heads, tokens, packed = signature.group_size, self.num_queries, signature.packed
        item = "sequence, KV head" + (", row tile" if heads * tokens > tiles.block_m else "")
        programs = f"{schedule.num_items} ({item}) x {schedule.num_splits} splits = {schedule.num_programs}"
        if tiles.balanced:
            programs = f"{schedule.num_programs} workers share {schedule.num_items} ({item}) in equal runs of blocks"
        programs = f"at most {programs}" if packed else programs  # the device finds out how many have work
        if self.step is not None:
            work = self.step.work_of_programs
            busy = int((work > 0).sum())
            programs += "" if busy == len(work) else f"; {busy} have work"
            programs += f", at most {count(int(work.max()), 'block')} each"
        loads = "by tensor descriptors" if tiles.descriptors else "by pointers"
        if signature.page_size:
            loads += f", from pages of {signature.page_size}"
        stored = [str(dtype).removeprefix("torch.") for dtype in (signature.key_dtype, signature.value_dtype)]
        if stored[0] != stored[1]:
            loads += f", keys in {stored[0]}, values in {stored[1]}"
        elif signature.key_dtype != signature.dtype:
            loads += f", {stored[0]}"
        if tiles.loads is Loads.WIDE:
            loads += f", in parts of {tiles.block_d} columns of keys and {tiles.block_dv} of values"
        used = f"{count(heads, 'query head')} x {count(tokens, 'token')}{' of all sequences' if packed else ''}"
        warps = f"{tiles.num_warps} warps, {tiles.num_stages} stages"
        rows = [
            ("device", self.device),
            ("tile", f"{tiles.block_m} query rows x {tiles.block_n} keys; {used} share a KV head"),
            ("", "9 warps in three groups, for latents" if tiles.latent else warps),
            ("KV loads", loads),
            ("programs", programs),
            *([("", f"at most {tiles.per_sm} of them on a multiprocessor at once")] if tiles.per_sm else []),
            ("kernels", "decode_split, then decode_combine" if tiles.split else "decode_split"),
        ]
        if self.autotune:
            rows.append(("autotune", self.autotune))
        if self.tuned is not None:
            rows += [("", f"{us:.1f} us  {name}") for name, us in self.tuned.tried]
        return "\n".join(["schedule", *(f"  {label:<10}{text}" for label, text in rows)])

    def save_picture(self, path: str | PathLike[str]) -> None:
        """Draws the blocks of one decode step: full, partial and dead, by split.

        Args:
            path: the file to write. Its suffix says whether it is a PNG, SVG or PDF.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: the blocks are not known, or the suffix is another one.
        """
        if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
            raise ValueError(f"`path` must end in .png, .svg or .pdf, got {str(path)!r}")
        if self.step is None:
            raise ValueError(f"there are no blocks to draw: {self.unknown}")
        draw(self.step, self.title, Path(path), Path(path).suffix[1:].lower())

    def save_page(self, path: str | PathLike[str]) -> None:
        """Writes the report and its picture as one HTML file that needs no other file.

        The picture is left out where matplotlib is missing or the blocks are not known.

        Args:
            path: the file to write.
        """
        Path(path).write_text(page(self.title, self._repr_html_()), encoding="utf-8")

    @cached_property
    def _png(self) -> bytes | None:
        if self.step is None:
            return None
        drawn = io.BytesIO()
        try:
            draw(self.step, self.title, drawn, "png")
        except ImportError:
            return None
        return drawn.getvalue()

    def _repr_png_(self) -> bytes | None:
        """The picture for notebooks; None without matplotlib, or if the blocks are not known."""
        return self._png

    def _repr_html_(self) -> str:
        """The report for notebooks, with the picture if there is one."""
        return body(self.sections(), self._png)


@without_autocast()
def explain_request(request: Request, options: DecodeOptions | None, device: str | DeviceFacts | None) -> Explanation:
    """As `flexdecode.explain`, for arguments that are already read."""
    call = _check(request, options, device)
    place = call.inputs.query.device
    target = find_target(place, call.signature.backend, device)
    if device == "cuda":
        place = torch.device("cuda", torch.cuda.current_device())
    return _report(call, target, place if device in (None, "cuda") else None)


class _Call(NamedTuple):
    """A checked call.

    Attributes:
        inputs: tensors and numbers.
        mods: the score_mod and the mask_mod.
        proven: what is known of both.
        signature, options: of the call.
        kv_lens: keys in use, int64 [B]; None if they are not known.
        first_token: position of the first query token, int64 [B]; None if it is not known.
        num_tokens: query tokens, int64 [B]; None if they are not known.
        kv_starts: first live slots, int64 [B], from 0 to `kv_lens`; None if they are not known or not given.
        kv_offset: positions of slot 0, int64 [B]; None likewise.
    """

    inputs: Inputs
    mods: tuple[Mod, Mod]
    proven: ProvenMods
    signature: Signature
    options: DecodeOptions
    kv_lens: torch.Tensor | None
    first_token: torch.Tensor | None
    num_tokens: torch.Tensor | None
    kv_starts: torch.Tensor | None = None
    kv_offset: torch.Tensor | None = None

    @property
    def ends(self) -> Ends:
        """The ends of the live positions of a sequence, in words."""
        shift, start = (
            () if given is None else (name,)
            for given, name in ((self.inputs.kv_offset, "kv_offset"), (self.inputs.kv_starts, "kv_start"))
        )
        return Ends(shift + start, (*shift, "kv_len"))


def _check(request: Request, options: DecodeOptions | None, device: str | DeviceFacts | None) -> _Call:
    """Checks and traces a call as `flex_decode` does. On the meta device, only shapes matter."""
    inputs, query = request.inputs, request.inputs.query
    options = DEFAULT_OPTIONS if options is None else options
    meta = getattr(query, "is_meta", False)
    if getattr(options, "backend", "") is None and (device is not None or meta):
        options = replace(options, backend="triton")
    captured = torch.device("cpu") if meta else None
    traced, mods = trace_call(
        inputs.only_shapes(), (request.score, request.mask), NO_AUX, options, request.listed, captured
    )
    place, sizes = captured or query.device, inputs.sizes
    lens, tokens = (_known(given, sizes.batch, place) for given in (inputs.given_kv_lens, inputs.given_q_lens))
    starts, shift = (
        None if given is None else _known(given, sizes.batch, place) for given in (inputs.kv_starts, inputs.kv_offset)
    )
    starts = None if starts is None or lens is None else starts.clamp(min=0).minimum(lens)
    first = None if lens is None or tokens is None else lens - tokens
    if inputs.kv_offset is not None:
        first = None if first is None or shift is None else first + shift
    if inputs.q_offset is not None:
        first = _known(inputs.q_offset, sizes.batch, place)
    check_all_lens(inputs._replace(kv_lens=lens, q_lens=tokens, kv_offset=shift), replace(options, debug=True))
    score_checks, mask_checks, _ = traced.checks(mods, sizes)
    proven = traced.proven(score_checks, mask_checks)
    return _Call(inputs, mods, proven, traced.signature, options, lens, first, tokens, starts, shift)


def _known(given: int | torch.Tensor, batch: int, place: torch.device) -> torch.Tensor | None:
    """Lengths or positions of sequences, int64 [B], on the device where values are read; None without values."""
    if isinstance(given, int):
        return torch.full((batch,), given, device=place)
    return None if given.is_meta else given.to(place, torch.int64).expand(batch)


def _report(call: _Call, target: Target, present: torch.device | None) -> Explanation:
    """What is known of a checked call on a device, which is at hand if `present` names it."""
    inputs, signature = call.inputs, call.signature
    schedule, source, known = None, None, Known(call.options, None, "")
    if target.facts is not None and not inputs.is_empty:
        check_device(inputs, target.facts)
        scheduler = Scheduler(signature, call.proven, target.facts, call.options)
        if call.options.autotune:
            known = known_choice(scheduler, call.proven, inputs.sizes, present)
            scheduler = Scheduler(signature, call.proven, target.facts, known.options)
        schedule = scheduler.choose(inputs, inputs.sizes, allows_latents(target.facts))[0].schedule
        source = module_path(call.proven, template_files(call.proven, signature, schedule.tiles))
    found = _find_step(call, schedule)
    step, unknown = (None, found) if isinstance(found, str) else (found, "")
    used, read = None, None
    if call.kv_lens is not None and (call.kv_starts is not None or inputs.kv_starts is None):
        keys = (call.kv_lens - (0 if call.kv_starts is None else call.kv_starts)) * inputs.key.shape[1]
        longest, total = int(keys.amax()) if len(keys) else 0, int(keys.sum())
        used = _bytes(inputs, lambda shared: longest if shared else total)
    if step is not None:
        read = _bytes(inputs, step.keys_read)
        if inputs.packed:
            step, unknown = None, "the device divides packed tokens into tiles, so blocks are not counted"
    elif schedule is None and inputs.is_empty:
        read = 0
    caches = (f"{name} {inputs.format.shown_shape(getattr(inputs, name))}" for name in ("key", "value"))
    shapes = ", ".join([f"query {list(inputs.query.shape)}", *caches])
    return Explanation(
        shapes=f"flex_decode: {shapes}, {str(inputs.query.dtype).removeprefix('torch.')}",
        score_mod=report_mod("score_mod", call.proven, call.mods[0], call.ends),
        mask_mod=report_mod("mask_mod", call.proven, call.mods[1], call.ends),
        device=target.name,
        signature=call.signature,
        num_queries=inputs.sizes.num_queries,
        schedule=schedule,
        step=step,
        unknown=unknown,
        cache_bytes=_bytes(inputs, lambda _: math.prod(inputs.key.shape[:3])),
        used_bytes=used,
        read_bytes=read,
        bandwidth=target.bandwidth,
        limit_us=None if read is None or target.bandwidth is None else read / target.bandwidth.bytes_per_us,
        source=source,
        tuned=known.tuned,
        autotune=known.text,
    )


def _find_step(call: _Call, schedule: Schedule | None) -> Step | str:
    """The blocks that a step reads, or why they are not known."""
    if schedule is None:
        if call.signature.backend == "torch":
            return (
                "the torch backend has no blocks, it reads the parts of the cache where the mask can be true; "
                '`device="H200"` explains for a GPU'
            )
        return "there is no query, so nothing is launched"
    if call.proven.block_lists:
        return "the lists of `block_mask` say which blocks are read"
    lens, tokens, first, starts = call.kv_lens, call.num_tokens, call.first_token, call.kv_starts
    keys = "kv_lens" if call.inputs.cu_seqlens_k is None else "cu_seqlens_k"
    queries = "cu_seqlens_q" if call.inputs.packed else "q_lens"
    for name, known in ((keys, lens), (queries, tokens), ("kv_starts", starts), ("kv_offset", call.kv_offset)):
        if known is None and (name in (keys, queries) or getattr(call.inputs, name) is not None):
            return f"`{name}` is on the meta device"
    if lens is None or tokens is None or first is None:
        return "`q_offset` is on the meta device"
    # A sequence without a query token reads nothing.
    lens, sizes = lens.where(tokens > 0, 0), call.inputs.sizes
    starts = None if starts is None else starts.minimum(lens)
    if call.inputs.packed:  # what is read does not depend on how the tokens of a sequence are divided
        sizes = sizes._replace(num_queries=max(1, int(tokens.max())))
    step = find_step(
        call.proven, call.mods, lens, first, tokens, call.signature, sizes, schedule, starts, call.kv_offset
    )
    return f"`{step}` is on the meta device" if isinstance(step, str) else step


def _bytes(inputs: Inputs, count_keys: Callable[[bool], int]) -> int:
    """Bytes of keys, values and their scales. `count_keys(True)` counts keys for sequences that share one cache."""
    total, key, value = 0, inputs.key, inputs.value
    for cache, scale, is_own in ((key, inputs.k_scale, True), (value, inputs.v_scale, not shares_storage(key, value))):
        per_key = cache.shape[3] * cache.element_size() if is_own else 0
        if isinstance(scale, torch.Tensor) and scale.dim() == 3:
            per_key += scale.element_size()
        total += count_keys(inputs.shares_keys) * per_key
    return total


def _size(number: int) -> str:
    """A number of bytes, in words for people."""
    power = max(0, min(3, (number.bit_length() - 1) // 10))
    return f"{number / (1 << 10 * power):.{1 if power else 0}f} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
