"""flexdecode inside other libraries."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .drop_in import flex_attention as flex_attention

__all__ = ["flex_attention"]


def __getattr__(name: str) -> Any:
    """Imports the drop-in function when it is asked for, because every program imports this package."""
    if name == "flex_attention":
        from .drop_in import flex_attention

        return flex_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
