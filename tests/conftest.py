import os

import torch

torch.set_num_threads(1)  # the models are tiny, and pytest-xdist runs one process per core
os.environ["OMP_NUM_THREADS"] = "1"  # likewise in the programs that tests start
