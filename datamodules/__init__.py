"""Sequences in, batches out: everything between a FASTA file and the tensors of one micro batch.

    records    files            -> a stream of named records
    splits     record           -> its train, valid and test segments
    shards     records          -> WebDataset tars and the rows of their index
    prepare    the three above, in parallel (workers), in a directory that a killed one goes on in (unfinished)
    foreign    others' tars     -> their index
    index      index.parquet    -> where every segment lies, and verified reads of byte ranges from a store
    check      every base against its checksum; report: what is in a shard set
    windows    index            -> which windows exist (letters, packing, mixture: what they need)
    order      seed, position   -> window: a pure function of numbers
    hashing    seed, epoch, ... -> random words
    visits     window, key      -> its bases, moved and turned as this visit has them
    collate    bases            -> tokens, labels
    batches    order, visits    -> numbered micro batches
    datamodule batches          -> Lightning's loaders
    markov     index            -> the bits per base that counting alone reaches

Nothing here imports `models` or `pipeline`. Import the modules by name: this file imports none of them, so
that `megabase.datamodules.prepare.run` does not load Lightning.
"""
