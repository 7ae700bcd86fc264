"""From a callable to a graph.

In: a user's `score_mod` or `mask_mod`, and what it captures.
Out: a `Graph` of immutable nodes with a canonical text, and the current captured values.
"""
