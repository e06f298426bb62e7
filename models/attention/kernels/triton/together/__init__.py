"""Sorted attention with all rounds in one launch: the second generation of the kernels.

Compared with one launch for each round (the files beside this folder):

- A round leaves a result in the dtype of the tensors, instead of fp32 sums that the next round reads and writes.
- Later rounds may find their rows in the cache, and the number of launches does not grow with the rounds.
- A slot knows which interval of slots it makes pairs with (`pairs`), so buckets are not compared for each pair.

The price is memory: while a pass runs, `rounds` times that of out, or of the gradients.
"""
