"""Torch runs on one thread here, so that other work on the machine neither slows small tensors nor splits sums."""

import torch

torch.set_num_threads(1)
