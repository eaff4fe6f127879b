import os

import torch
from hypothesis import settings

torch.set_num_threads(1)  # the models are tiny, and pytest-xdist runs one process per core
os.environ["OMP_NUM_THREADS"] = "1"  # likewise in the programs that tests start

# pytest -m nightly --hypothesis-profile=nightly
settings.register_profile("default", deadline=None, max_examples=30, print_blob=True)
settings.register_profile("nightly", parent=settings.get_profile("default"), max_examples=10_000)

collect_ignore = ["upstream"]  # tests of others, with settings of their own: nox -s upstream


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cuda", choices=["cuda", "cpu"], help="of the tests marked cuda (test_cuda.py)"
    )
