"""Decode attention from two Python functions, generated as split-KV Triton kernels.

>>> import flexdecode
>>> out = flexdecode.flex_decode(query, key, value, score_mod=flexdecode.mods.softcap(50.0))
"""

from . import mods as mods
from .api import cache_info as cache_info
from .api import clear_cache as clear_cache
from .api import explain as explain
from .api import flex_decode as flex_decode
from .call.inputs import DecodeOptions as DecodeOptions
from .errors import CompileError as CompileError
from .errors import FlexDecodeError as FlexDecodeError
from .errors import TraceError as TraceError
from .errors import TritonVersionError as TritonVersionError
from .errors import UnsupportedOpError as UnsupportedOpError
from .integrations import ops as _ops  # noqa: F401 (registers the custom ops, which exported programs name)
from .kv.kv_cache import KVCache as KVCache
from .kv.kv_cache import OutOfPagesError as OutOfPagesError
from .kv.kv_cache import PagedKVCache as PagedKVCache
from .kv.merge import merge_attention as merge_attention
from .memos import CacheInfo as CacheInfo
from .report.explanation import Explanation as Explanation
from .version import __version__ as __version__

__all__ = [
    "CacheInfo",
    "CompileError",
    "DecodeOptions",
    "Explanation",
    "FlexDecodeError",
    "KVCache",
    "OutOfPagesError",
    "PagedKVCache",
    "TraceError",
    "TritonVersionError",
    "UnsupportedOpError",
    "__version__",
    "cache_info",
    "clear_cache",
    "explain",
    "flex_decode",
    "merge_attention",
    "mods",
]
