"""From a graph to what is known of it.

In: a `Graph`.
Out: intervals of keys that can attend, proofs that indices are in range, dependences, and the formula as text.
"""
