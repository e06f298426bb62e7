"""One thread: other work on the machine must not make small tensors crawl, nor change how sums are split."""

import torch

torch.set_num_threads(1)
