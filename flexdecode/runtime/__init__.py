"""From a call to its result.

In: a request, which is a call as its caller wrote it.
Out: a `Plan`, which launches a kernel or computes by PyTorch operations.
"""
