"""Caches that grow, and attention over parts of a cache.

In: new keys and values, or outputs with their log-sum-exps.
Out: `KVCache` and `PagedKVCache`, which a call reads in place, and `merge_attention`.
"""
