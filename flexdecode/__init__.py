"""Decode attention from two Python functions, generated as split-KV Triton kernels.

>>> import flexdecode
>>> out = flexdecode.flex_decode(query, key, value, score_mod=flexdecode.mods.softcap(50.0))
"""

from typing import TYPE_CHECKING, Any

from . import mods as mods
from .api import cache_info as cache_info
from .api import clear_cache as clear_cache
from .api import explain as explain
from .api import flex_decode as flex_decode
from .api import prepare as prepare
from .api import save_kernels as save_kernels
from .api import warmup as warmup
from .call.inputs import DecodeOptions as DecodeOptions
from .errors import CompilationForbiddenError as CompilationForbiddenError
from .errors import CompileError as CompileError
from .errors import FlexDecodeError as FlexDecodeError
from .errors import KernelFolderError as KernelFolderError
from .errors import TraceError as TraceError
from .errors import TritonVersionError as TritonVersionError
from .errors import UnsupportedOpError as UnsupportedOpError
from .integrations import ops as _ops  # noqa: F401 (registers the custom ops, which exported programs name)
from .kv.kv_cache import KVCache as KVCache
from .kv.layers import CacheLayer as CacheLayer
from .kv.merge import merge_attention as merge_attention
from .kv.paged import OutOfPagesError as OutOfPagesError
from .kv.paged import PagedKVCache as PagedKVCache
from .kv.slots import write_kv as write_kv
from .memos import CacheInfo as CacheInfo
from .runtime.ahead import LoadedKernels as LoadedKernels
from .runtime.ahead import SavedKernel as SavedKernel
from .runtime.ahead import load as load
from .runtime.prepared_call import PreparedCall as PreparedCall
from .switch import allow_compilation as allow_compilation
from .switch import forbid_compilation as forbid_compilation
from .version import __version__ as __version__

if TYPE_CHECKING:
    from .report.explanation import Explanation as Explanation

__all__ = [
    "CacheInfo",
    "CacheLayer",
    "CompilationForbiddenError",
    "CompileError",
    "DecodeOptions",
    "Explanation",
    "FlexDecodeError",
    "KVCache",
    "KernelFolderError",
    "LoadedKernels",
    "OutOfPagesError",
    "PagedKVCache",
    "PreparedCall",
    "SavedKernel",
    "TraceError",
    "TritonVersionError",
    "UnsupportedOpError",
    "__version__",
    "allow_compilation",
    "cache_info",
    "clear_cache",
    "explain",
    "flex_decode",
    "forbid_compilation",
    "load",
    "merge_attention",
    "mods",
    "prepare",
    "save_kernels",
    "warmup",
    "write_kv",
]


def __getattr__(name: str) -> Any:
    """Imports what few programs need when it is asked for, because programs wait for the import of the package."""
    if name == "Explanation":
        from .report.explanation import Explanation

        return Explanation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
