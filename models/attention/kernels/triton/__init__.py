"""Sorted attention and its hashing on a GPU, in Triton.

`host` has the functions that dispatch calls; it imports the other files, and triton, at the first call.
"""
