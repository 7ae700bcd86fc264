"""The practical floor: the best plain read-only stream of as many bytes as a row's live keys and values."""

import dataclasses
import statistics

import torch
import triton
import triton.language as tl

from .timing import COLD_BYTES, Replay

__all__ = ["FloorMeter", "stream_read"]

MAGIC = 0x5EED


@triton.jit
def stream_read(source, result, num_words, store_all, MAGIC: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Read `num_words` int32 words once and add them up per program.

    Args:
        source: int32 `[num_words]`.
        result: int32 `[programs]`; a program's sum (modulo 2^32) is stored if it equals `MAGIC` or `store_all` is not
            0, so that no load can be left out, and a timed run writes next to nothing.
        num_words: Words to read; a program takes every `programs`-th block of `BLOCK` words.
        store_all: Not 0 to store every sum, for the check.
        MAGIC: A value that the sum is unlikely to have.
        BLOCK: Words per load.
        STAGES: Depth of the software pipeline of the loads.
    """
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.int32)
    for start in tl.range(pid * BLOCK, num_words, tl.num_programs(0) * BLOCK, num_stages=STAGES):
        total += tl.load(source + start + offs, mask=start + offs < num_words, other=0)
    value = tl.sum(total)
    tl.store(result + pid, value, mask=(value == MAGIC) | (store_all != 0))


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """One way to launch `stream_read`; `per_sm` is None for one block per program."""

    block: int
    warps: int
    per_sm: int | None
    stages: int

    def __str__(self) -> str:
        grid = "one block per program" if self.per_sm is None else f"{self.per_sm} programs per SM"
        return f"{4 * self.block} byte blocks, {self.warps} warps, {grid}, {self.stages} stages"


CONFIGS = (
    StreamConfig(2048, 4, None, 1),
    StreamConfig(4096, 4, None, 1),
    StreamConfig(4096, 8, None, 1),
    StreamConfig(8192, 8, None, 1),
    StreamConfig(2048, 4, 8, 1),
    StreamConfig(2048, 4, 16, 1),
    StreamConfig(4096, 4, 4, 1),
    StreamConfig(4096, 4, 8, 1),
    StreamConfig(4096, 8, 4, 1),
    StreamConfig(8192, 8, 2, 1),
    StreamConfig(8192, 8, 4, 1),
    StreamConfig(8192, 16, 2, 1),
    StreamConfig(4096, 4, 2, 4),
    StreamConfig(4096, 8, 2, 4),
    StreamConfig(8192, 8, 1, 4),
    StreamConfig(8192, 16, 1, 6),
)


class FloorMeter:
    """Finds the fastest stream for a number of bytes and a kind of input, and remembers it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._known: dict[tuple[int, str], StreamConfig] = {}

    def stream(self, num_bytes: int, inputs: str) -> tuple[Replay, str]:
        """The fastest stream of `num_bytes`, with "cold" or "warm" inputs, ready to be timed; and how it is launched.

        Raises:
            RuntimeError: A stream did not read what it should have.
        """
        num_sets = -(-COLD_BYTES // num_bytes) if inputs == "cold" else 1
        buffer = torch.randn(num_sets, num_bytes // 4, device=self._device).view(torch.int32)
        if (num_bytes, inputs) not in self._known:
            for config in CONFIGS:
                self._check(buffer[0], config)
            times = {config: statistics.median(self._replay(buffer, config).time()) for config in CONFIGS}
            self._known[num_bytes, inputs] = min(times, key=times.__getitem__)
        config = self._known[num_bytes, inputs]
        return self._replay(buffer, config), str(config)

    def _replay(self, buffer: torch.Tensor, config: StreamConfig) -> Replay:
        num_programs = self._num_programs(buffer.shape[1], config)
        result = torch.zeros(num_programs, dtype=torch.int32, device=self._device)
        return Replay([lambda words=words: self._read(words, result, config) for words in buffer])

    def _num_programs(self, num_words: int, config: StreamConfig) -> int:
        blocks = triton.cdiv(num_words, config.block)
        return blocks if config.per_sm is None else min(blocks, config.per_sm * self._num_sms)

    def _read(self, words: torch.Tensor, result: torch.Tensor, config: StreamConfig, store_all: int = 0) -> None:
        stream_read[(result.numel(),)](
            words, result, words.numel(), store_all, MAGIC, config.block, config.stages, num_warps=config.warps
        )

    def _check(self, words: torch.Tensor, config: StreamConfig) -> None:
        result = torch.zeros(self._num_programs(words.numel(), config), dtype=torch.int32, device=self._device)
        # Triton specialises integers on divisibility by 16: with 16 the check runs the kernel that is timed with 0.
        self._read(words, result, config, store_all=16)
        found, expected = (int(part.sum(dtype=torch.int64)) % 2**32 for part in (result, words))
        if found != expected:
            raise RuntimeError(f"the read-only stream ({config}) added up to {found}, expected {expected}")
