"""From graphs, proofs and a signature to a compiled kernel.

In: what is proven of both mods, a `Signature` and `Tiles`.
Out: the text of a Triton module, the types of its arguments, and a `Kernel`.
"""
