"""Shared by all tests: one thread a process, so that tiny models are not slowed by waiting for each other."""

import torch

torch.set_num_threads(1)
