"""Kernels in folders: compiled ahead of time, launched without Triton and without a compiler.

Takes compiled kernels with the text that identifies each of them. Gives them back by this text, in another process.
"""
