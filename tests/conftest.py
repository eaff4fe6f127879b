import torch

torch.set_num_threads(1)  # the models are tiny, and pytest-xdist runs one process per core
