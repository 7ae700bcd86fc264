"""How a call is divided into launches, tiles and programs. The signature and the facts about the device decide it."""

from __future__ import annotations

from typing import NamedTuple

from ..analysis.proven import ProvenMods
from .columns import LARGE_ROWS, SMALL_ROWS, find_columns, is_paired, next_power_of_2
from .copies import LEAST_PAGE, is_copied, most_copied
from .descriptor import Matrix, as_matrices, as_matrix
from .device import DeviceFacts
from .inputs import DecodeOptions, Inputs, Sizes
from .signature import Signature, all_strides, in_pairs
from .splits import FLOAT32_SPEEDS, HALF_SPEEDS, Work, divide
from .tiles import Loads, Tiles, Use, find_tiles, has_latent_kernel, most_rows

# For smaller caches, finding the balanced shares takes longer than the time that they save.
BALANCED_BYTES = 64 << 20
BALANCED_LENGTH, BALANCED_PAGES = 8192, 6144  # tokens; in pages that are too small for the copy engine
MEAN_SHARE = 0.5  # of the longest item, where a mask gives sequences different keys: an estimate
LEAST_BLOCKS = 4  # of 64 keys, that a program has there
SHORT_SHARE, LONG_SHARE = 1024, 4096  # keys of a program
ALL_ROWS = (1 << 31) - 1
FEW_TOKENS = 8  # where sequences differ, those with up to so many tokens get small tiles, as far as these have the rows
FEW_ROWS = 128  # where no sequence of packed queries can have more rows, one launch computes all of them
MAX_WORKSPACE = 48 << 20  # bytes of partial results that a default schedule may need for one launch
LATENT_ROWS = 16  # with more query rows per KV head, the kernel for latents is faster than the general one


class Part(NamedTuple):
    """The sequences that one launch of the first pass computes, and their row tiles.

    Packed queries may need two launches: short and long sequences get tiles of different sizes. The host does not know
    which sequences are short, so `num_tiles` is an upper limit, and programs without a tile end at once.

    Attributes:
        block_m: query rows of a tile.
        num_tiles: tiles of all sequences, for each KV head.
        busy_tiles: how many of them have rows, as far as the host can guess.
        row_range: the fewest and the most query rows per KV head of the sequences.
        is_prompt: whether many rows of a sequence read the same keys, so that products take longer than loads.
    """

    block_m: int
    num_tiles: int
    busy_tiles: int
    row_range: tuple[int, int]
    is_prompt: bool


class Schedule(NamedTuple):
    """Tiles and grid of one launch of the first pass.

    Attributes:
        tiles: compile-time sizes.
        num_items: (row tile of a sequence, KV head) pairs.
        num_splits: programs per item; if balanced, the number of workers that share all items.
        block_s: partial results that the combine pass merges per step.
        row_range: the fewest and the most query rows per KV head of the sequences that take part.
    """

    tiles: Tiles
    num_items: int
    num_splits: int
    block_s: int
    row_range: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Programs of the first pass."""
        return (self.num_splits, 1) if self.tiles.balanced else (self.num_items, self.num_splits)

    @property
    def num_programs(self) -> int:
        """The number of all programs of the first pass."""
        return self.grid[0] * self.grid[1]

    @property
    def num_places(self) -> int:
        """Tiles of partial results. A balanced worker has two: of an item that it continues, and one that it begins."""
        if not self.tiles.split:
            return 0
        return 2 * self.num_splits if self.tiles.balanced else self.num_items * self.num_splits


class PlannedLaunch(NamedTuple):
    """One launch of the first pass.

    Attributes:
        schedule: tiles and grid.
        strides: 16, as `all_strides` gives them; of caches in pairs if the tiles are.
        matrices: the caches as the descriptors show them; None if they are loaded through pointers.
    """

    schedule: Schedule
    strides: tuple[int, ...]
    matrices: tuple[Matrix, Matrix] | None


class Scheduler:
    """Chooses the launches of calls that differ in sizes and addresses only.

    A new length comes with every token of a cache that grows, and with every step of packed queries. So what does not
    depend on sizes is found once.
    """

    def __init__(self, signature: Signature, proven: ProvenMods, facts: DeviceFacts, options: DecodeOptions) -> None:
        self.signature, self.facts, self.options = signature, facts, options
        self.is_bounded = proven.bounds.is_bounded
        self.packed, self.group, self.format = signature.packed, signature.group_size, signature.format
        columns = find_columns(signature, facts)
        self.kv_bytes = columns.kv_bytes
        self.large_rows = most_rows(signature, facts, self.is_bounded)
        self.paired = is_paired(signature, facts, options)
        # A score_mod that reads captured tensors for every key waits for them. A second program on each multiprocessor
        # works meanwhile.
        self.waits = proven.fetches and not self.is_bounded
        self.copied_speeds = FLOAT32_SPEEDS if signature.is_float32 else HALF_SPEEDS
        # Measured on an H200: of kernels that are not copied, these gain if no other programs come beside theirs.
        self.keeps_away = (self.is_bounded or self.paired) and facts.backend == "cuda" and not options.batch_invariant
        self.lengths_differ = any(signature.kind(x) is not None for x in ("kv_lens", "kv_starts", "cu_seqlens_k"))
        self.bounds_differ = self.is_bounded and proven.bounds.differ
        # The batch may decide whether there are matrices, and so it would decide the tiles. `batch_invariant` forbids
        # this. With lists, all blocks may be partial, and partial blocks gain nothing from descriptors.
        described = facts.has_descriptors and self.format.has_matrices
        described = described and not (options.batch_invariant or proven.block_lists)
        self.has_latents = described and has_latent_kernel(signature, facts, options)
        # In blocks where the mask is evaluated, zeroing the dead rows of V costs more than descriptors gain. One box
        # holds the columns of a key.
        self.has_matrices = described and proven.num_full > 0 and columns.block_r == 0
        self.tiles: dict[tuple[Loads, Use], Tiles] = {}

    def choose(self, inputs: Inputs, sizes: Sizes, allow_latents: bool = True) -> list[PlannedLaunch]:
        """Chooses the launches of the first pass, for the longest sequence that the cache can hold.

        Args:
            inputs: of the call.
            sizes: of the call.
            allow_latents: whether the kernel for latents can be chosen.

        Returns:
            One launch, or two of which the second one has the larger tiles. The kernel for latents reads the keys
            through two descriptors.
        """
        key, value = (in_pairs(x) if self.paired else x for x in (inputs.key, inputs.value))
        strides, matrices, loads = all_strides(inputs, key, value), None, Loads.POINTERS
        if allow_latents and self._wants_latents(sizes):
            latents = as_matrix(key, strides[4:8])
            matrices, loads = (None if latents is None else (latents, latents)), Loads.LATENTS
        if matrices is None and self.has_matrices:
            matrices = as_matrices(key, value, strides[4:8], strides[8:12])
            loads = Loads.DESCRIPTORS
        loads = Loads.POINTERS if matrices is None else loads
        found = []
        for part in self.parts(sizes, loads is Loads.LATENTS):
            chosen = self._schedule(sizes, part, loads)
            found.append(PlannedLaunch(chosen, strides, matrices if chosen.tiles.descriptors else None))
        return found

    def _wants_latents(self, sizes: Sizes) -> bool:
        """Whether the kernel for latents is faster than the general one."""
        return self.has_latents and (self.packed or self.group * sizes.num_queries > LATENT_ROWS)

    def busy_items(self, sizes: Sizes) -> int:
        """How many items of the first launch have rows, as far as the host can guess."""
        return self.parts(sizes, self._wants_latents(sizes))[0].busy_tiles * sizes.num_kv_heads

    def parts(self, sizes: Sizes, latent: bool = False) -> tuple[Part, ...]:
        """Divides the sequences of a call into one or two launches.

        Padded queries and packed queries of similar lengths need one. A sequence of packed queries gets small tiles if
        it fits into one, unless the caller's `max_q_len` or the number of tokens shows that small tiles suit all.
        """
        batch, _, _, tokens, hint = sizes
        group, large = self.group, SMALL_ROWS if latent else self.large_rows
        most = min(large, SMALL_ROWS)
        if not self.packed:
            rows = group * tokens
            is_prompt = rows > LARGE_ROWS
            block_m = SMALL_ROWS if latent else min(max(16, next_power_of_2(rows)), large if is_prompt else most)
            num_tiles = batch * -(-rows // block_m)
            return (Part(block_m, num_tiles, num_tiles, (0, ALL_ROWS), is_prompt),)
        longest = likely = tokens if hint is None else min(tokens, hint)
        if hint is None:  # then lengths are alike, most likely; a longer sequence has several tiles
            likely = -(-tokens // batch)
            longest = tokens if likely > 1 else 1
        # Where most sequences have few rows, several small tiles for a longer one take less time than a second launch.
        few = group * longest <= (FEW_ROWS if group * likely > FEW_ROWS // 4 else 4 * FEW_ROWS)
        if latent or most == 16:
            return (self._all_sequences(sizes, most, False),)
        if few and not self.options.batch_invariant:
            return (self._all_sequences(sizes, min(max(16, next_power_of_2(group * likely)), most), False),)
        if batch == 1 and not self.options.batch_invariant:
            return (self._all_sequences(sizes, large, True),)
        # With `batch_invariant`, these sizes may not depend on the other sequences.
        small = min(max(16, next_power_of_2(group * FEW_TOKENS)), most, large // 2)
        tiles = group * tokens // large
        return (
            Part(small, batch, min(batch, tokens), (0, small), False),
            Part(large, batch + tiles + 1, max(tiles, 1), (small + 1, ALL_ROWS), True),
        )

    def _all_sequences(self, sizes: Sizes, block_m: int, is_prompt: bool) -> Part:
        """One launch for all sequences of packed queries."""
        rows = self.group * sizes.num_queries
        busy = max(min(sizes.batch, sizes.num_queries), -(-rows // block_m))
        return Part(block_m, sizes.batch + rows // block_m + 1, busy, (0, ALL_ROWS), is_prompt)

    def _schedule(self, sizes: Sizes, part: Part, loads: Loads) -> Schedule:
        """Chooses tiles and splits of one launch."""
        options, num_sms = self.options, self.facts.num_sms
        batch, num_kv_heads, max_kv_len, _, _ = sizes
        block_m, num_tiles, busy_tiles, row_range, is_prompt = part
        latent = loads is Loads.LATENTS
        num_items, busy_items = num_tiles * num_kv_heads, busy_tiles * num_kv_heads
        total_bytes = busy_items * max_kv_len * self.kv_bytes
        longest = -(-max_kv_len // (options.block_n or 64))
        balanced = self._is_balanced(part, sizes, total_bytes)
        alone = latent or block_m > SMALL_ROWS  # then one program fills a multiprocessor
        per_sm = 1 if alone else 2
        of = self.signature, self.facts, options
        copied = loads is Loads.DESCRIPTORS and is_copied(*of, self.is_bounded or is_prompt)
        if balanced:
            num_splits = options.num_splits or max(1, min(per_sm * num_sms, busy_items * longest))
        elif options.batch_invariant:
            tiles_of_one = 1 if self.packed else num_tiles // max(batch, 1)
            num_splits = 1 if row_range[0] > 0 else max(1, num_sms // max(num_kv_heads * tiles_of_one, 1))
            num_splits, per_sm = options.num_splits or num_splits, 1
        else:
            fit = 1 if alone else most_copied(*of, block_m) if copied else 2
            waits = self.waits and not alone
            speeds = self.copied_speeds if copied else HALF_SPEEDS
            share, differ = 1.0, self.lengths_differ
            if self.bounds_differ and batch > 1:
                share, differ, longest = MEAN_SHARE, True, -(-longest // LEAST_BLOCKS)
            work = Work(busy_items, longest, total_bytes, num_sms, waits, differ, share, copied, speeds)
            num_splits, per_sm = divide(work, fit, options.num_splits)
            if num_splits > 1 and not options.num_splits:
                most = most_splits(num_items, block_m, self.signature.v_head_dim)
                num_splits, per_sm = divide(work, fit, most) if most < num_splits else (num_splits, per_sm)
        # A latent cache has many query rows. Each row is wide and usually has few partial results.
        block_s = (4 if latent else 32) if balanced else _at_least(num_splits, (4, 32, 128))
        block_b = _at_least(batch, (32, 256, 1024)) if balanced else 0
        is_short = not balanced and max_kv_len < SHORT_SHARE * num_splits
        is_long = not balanced and max_kv_len > LONG_SHARE * num_splits and self.signature.page_size % 256 == 0
        split, many = num_splits > 1 or balanced, balanced and batch > 256
        programs = num_splits if balanced else num_items * num_splits
        limited = self.keeps_away and (per_sm - 1) * num_sms < programs <= per_sm * num_sms
        use = Use(block_m, is_prompt, copied, per_sm, is_short, is_long, split, balanced, block_b, many, limited)
        tiles = self.tiles.get((loads, use)) or self._find_tiles(loads, use)
        return Schedule(tiles, num_items, num_splits, block_s, row_range)

    def _find_tiles(self, loads: Loads, use: Use) -> Tiles:
        """Chooses the tiles for a use, and remembers them."""
        of = self.signature, self.facts, self.options
        tiles = find_tiles(*of, loads, use, self.is_bounded)
        if tiles.loads is Loads.DESCRIPTORS and self.signature.page_size % tiles.block_n:
            tiles = find_tiles(*of, Loads.POINTERS, use, self.is_bounded)
        self.tiles[loads, use] = tiles
        return tiles

    def _is_balanced(self, part: Part, sizes: Sizes, total_bytes: int) -> bool:
        """Whether all work is divided into equal runs. The caller can say so; by default it is if lengths may differ.

        A second launch, for long sequences, has enough tiles to fill the device by itself.
        """
        options = self.options
        if part.row_range[0] > 0:
            return False
        if options.schedule is not None or options.num_splits is not None or options.batch_invariant:
            return options.schedule == "balanced"
        shortest = BALANCED_PAGES if self.signature.page_size % LEAST_PAGE and not self.is_bounded else BALANCED_LENGTH
        if sizes.batch == 1 or total_bytes < BALANCED_BYTES or sizes.max_kv_len < shortest:
            return False
        if 8 * part.busy_tiles > self.facts.num_sms * sizes.batch:
            return False
        if self.is_bounded:  # a worker needs a long share, because few keys of an item may be live
            items = part.busy_tiles * sizes.num_kv_heads
            return self.bounds_differ and items * BALANCED_LENGTH <= self.facts.num_sms * sizes.max_kv_len
        return self.lengths_differ


def most_splits(num_items: int, block_m: int, v_head_dim: int) -> int:
    """The splits whose partial results fit into `MAX_WORKSPACE`; at least 1."""
    return max(1, MAX_WORKSPACE // (num_items * block_m * (v_head_dim + 2) * 4))


def _at_least(number: int, choices: tuple[int, ...]) -> int:
    """The first of ascending choices that is at least the number; the last one if none is."""
    for choice in choices:
        if number <= choice:
            return choice
    return choices[-1]
