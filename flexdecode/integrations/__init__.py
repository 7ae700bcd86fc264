"""flexdecode inside other libraries."""

from .drop_in import flex_attention as flex_attention

__all__ = ["flex_attention"]
