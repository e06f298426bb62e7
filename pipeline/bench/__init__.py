"""`megabase bench`: megabase against its peers, in one process, on this machine.

    attention   one attention layer's core, forward and backward
    model       one training step, and its memory against length and depth
    data        training batches a second, and the first one after resuming

`contest` decides who runs when and how often, and knows nothing of torch; `lab` runs it on a CPU or a GPU; `peers`
makes the peers do the same work, `readers` does where it is reading; `report` prints and writes; `draw` draws.
"""
