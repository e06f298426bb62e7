"""Attention over keys in sorted order, and the hashing that sorts: one function in four implementations.

`dispatch` chooses the implementation and is what layers call; `reference` is the one to read; `inputs` has the types.
"""
