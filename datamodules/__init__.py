"""Sequences in, batches out: everything between a FASTA file and the tensors of one micro batch.

    records    files            -> a stream of named records
    splits     record           -> its train, valid and test segments
    shards     records          -> WebDataset tars and their index, published by rename
    prepare    the three above, as the command runs them
    index      index.parquet    -> where every segment lies, and byte-range reads of it
    windows    index            -> which windows exist and in which order: pure functions of numbers
    hashing    seed, epoch, ... -> random words
    collate    bytes            -> tokens, labels
    batches    windows, collate -> numbered micro batches
    datamodule batches          -> Lightning's loaders
    markov     index            -> the bits per base that counting alone reaches

Nothing here imports `models` or `pipeline`. Import the modules by name: this file imports none of them, so
that `datamodules.prepare` does not load Lightning.
"""
