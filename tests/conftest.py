import gc
import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the models are tiny, and pytest-xdist runs one process per core
os.environ["OMP_NUM_THREADS"] = "1"  # likewise in the programs that tests start

# pytest -m nightly --hypothesis-profile=nightly
settings.register_profile("default", deadline=None, max_examples=30, print_blob=True)
settings.register_profile("nightly", parent=settings.get_profile("default"), max_examples=10_000)

collect_ignore = ["upstream"]  # tests of others, with settings of their own: nox -s upstream

# Whose tests read what one long run has left.
SHARE_A_RUN = {
    "tests/test_benchmarks.py", "tests/test_claims.py", "tests/test_hf_clip.py", "tests/test_imagenet.py",
    "tests/test_open_clip_program.py", "tests/test_package.py", "tests/test_site.py",
}  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Those tests go to one process, file by file, and all others wherever one is free.

    xdist 3.8's own groups are suffixes of a test's name, which pytest 9.2 does not report.
    """
    if config.getvalue("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByRun(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return file if file in SHARE_A_RUN else nodeid

    return ByRun(config, log)


def pytest_collection_finish():
    """The libraries' objects stay for good: no collection of garbage looks at these millions again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before pytest's own selects by mark
def pytest_collection_modifyitems(config, items):
    """What takes long and finds what other tests find as well waits for the night, with its reason; so does the rest of
    what is cut short by day."""
    for item in items:
        if "thorough" in item.fixturenames:
            item.add_marker(pytest.mark.nightly)
        if (mark := item.get_closest_marker("thorough")) is not None and not config.getoption("thorough"):
            item.add_marker(pytest.mark.skip(reason=f"--thorough runs it: {mark.args[0]}"))


@pytest.fixture
def thorough(request):
    """Whether every variant is asked for, as it is every night."""
    return request.config.getoption("thorough")


def pytest_addoption(parser):
    parser.addoption(
        "--thorough", action="store_true", help="also what is marked thorough, and every variant of what is cut short"
    )
    parser.addoption(
        "--device", default="cuda", choices=["cuda", "cpu"], help="of the tests marked cuda (test_cuda.py)"
    )
    parser.addoption(
        "--new-names",
        default="xfail",
        choices=["xfail", "fail"],
        help="what to do about names of a timm or transformers newer than docs/hosts.md (test_every_name.py)",
    )
