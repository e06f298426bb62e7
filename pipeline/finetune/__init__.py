"""`megabase finetune`: labelled sequences, a head on a pretrained body, and what the result is worth.

It trains through the same pipeline as pretraining (`training.task`): ranks, ZeRO, checkpoints, resume, journal, MLflow.
"""
