"""Caches that grow, and attention over parts of a cache.

In: new keys and values, or outputs with their log-sum-exps.
Out: `KVCache` and `PagedKVCache` with its layers, which a call reads in place, `write_kv` and `merge_attention`.

`cache` has the books of the host, `paged` the pages and `layers` what a layer sees of them. `writing` writes on the
device, by PyTorch operations or by kernels that `launching` starts. `reading` puts a cache into a call.
"""
