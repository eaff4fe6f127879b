"""What `pip install gaussmask` brings, and what a bare `import gaussmask` loads."""

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

import gaussmask

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
MODULES = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py")} | {"gaussmask/py.typed"}
PROGRAMS = {path.name for path in (ROOT / "examples").glob("*.py")} | {"small_clip.json"}


def run(*command, **settings):
    return subprocess.run(command, capture_output=True, text=True, check=True, **settings).stdout


# The import

TELL_IMPORT = """
import sys
import torch, einops
before = set(sys.modules)
import gaussmask
print(*set(sys.modules) - before)
"""


def test_importing_brings_in_no_host_library_and_no_matplotlib():
    code = "import sys, gaussmask; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = run(sys.executable, "-c", code).split()
    assert "torch" in loaded
    assert not {"timm", "transformers", "open_clip", "matplotlib", "torchvision", "numpy.testing"} & set(loaded)


def test_importing_loads_no_module_of_others_that_torch_and_einops_have_not_loaded():
    """So that it takes no time beyond theirs."""
    loaded = run(sys.executable, "-c", TELL_IMPORT).split()
    others = {name.partition(".")[0].lstrip("_") for name in loaded} - set(sys.stdlib_module_names)
    assert others == {"gaussmask"}


# The API


def test_every_public_name_is_there_and_documented():
    assert sorted(gaussmask.__all__) == gaussmask.__all__
    for name in gaussmask.__all__:
        assert getattr(gaussmask, name).__doc__
    for name in gaussmask.functional.__all__:
        assert getattr(gaussmask.functional, name).__doc__


@pytest.mark.skipif(importlib.util.find_spec("pyright") is None, reason="needs pyright")
def test_every_public_symbol_has_a_type(tmp_path):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # pyright looks for the python there
    command = [sys.executable, "-m", "pyright", "--verifytypes", "gaussmask", "--ignoreexternal"]
    told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PATH": path})
    assert "Type completeness score: 100%" in told.stdout, told.stdout


# The wheel and the sdist


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and an sdist: those of `make package`, or fresh ones."""
    if "DIST" in os.environ:
        return Path(os.environ["DIST"])
    pytest.importorskip("twine")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT))
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def metadata(wheel):
    (content,) = (content for name, content in wheel.items() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(content)


@pytest.fixture(scope="module")
def description(metadata):
    return metadata.get_payload(decode=True).decode()


def test_the_wheel_has_the_package_its_types_the_programs_and_its_licence_and_nothing_else(wheel):
    folder = f"gaussmask-{gaussmask.__version__}.dist-info"
    about = {f"{folder}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
    assert wheel.keys() == MODULES | {f"gaussmask_examples/{name}" for name in PROGRAMS} | about
    assert all(wheel[name] == (ROOT / "src" / name).read_bytes() for name in MODULES)
    assert all(wheel[f"gaussmask_examples/{name}"] == (ROOT / "examples" / name).read_bytes() for name in PROGRAMS)


TELL_PROGRAM = """
import contextlib, runpy, sys
sys.argv = ["compare_methods", "--help"]
with contextlib.suppress(SystemExit):  # python -m
    runpy.run_module("gaussmask_examples.compare_methods", run_name="__main__", alter_sys=True)
import clip_training
print(clip_training.__file__)
"""


def test_the_programs_run_from_the_wheel_and_from_a_checkout(wheel, tmp_path):
    for name, content in wheel.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for place in (tmp_path, SOURCE):
        there = {**os.environ, "PYTHONPATH": str(place)}
        told = run(sys.executable, "-c", TELL_PROGRAM, cwd=tmp_path.parent, env=there)
        assert "--minutes" in told
        folder = Path(told.strip().splitlines()[-1]).parent
        assert folder == (tmp_path / "gaussmask_examples" if place == tmp_path else ROOT / "examples")


def test_the_sdist_has_what_builds_the_wheel_and_the_changelog(built):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    about = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "PKG-INFO", "pyproject.toml", ".gitignore"}
    assert names == {f"src/{name}" for name in MODULES} | {f"examples/{name}" for name in PROGRAMS} | about


def test_the_index_will_take_and_render_them(built):
    told = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *map(str, built.iterdir()))
    assert told.count("PASSED") == 2


def test_only_torch_and_einops_come_without_an_extra(metadata):
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line)[0] for line in required} == {"einops", "torch"}
    assert set(metadata.get_all("Provides-Extra")) == {"all", "examples", "open-clip", "plot", "timm", "transformers"}
    assert {line.partition(",")[0] for line in metadata.get_all("Project-URL")} >= {"Documentation", "Source"}


def test_links_of_the_long_description_are_absolute_and_lead_to_files_of_this_version(description):
    targets = re.findall(r"\]\(([^)]+)\)", description)
    assert len(targets) > 5
    assert all(target.startswith("https://") for target in targets)
    places = re.compile(r"https://github.com/gaussmask/gaussmask/(?:blob|raw|tree)/([^/#]+)(?:/([^#]+))?(?:#(.+))?$")
    within = [match for match in map(places.match, targets) if match]
    readme = (ROOT / "README.md").read_text("utf-8")
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^## (.+)$", readme, flags=re.MULTILINE)}
    assert {match[3] for match in within if match[2] is None} <= anchors
    assert len(within) > 10
    ref = "main" if ".dev" in gaussmask.__version__ else f"v{gaussmask.__version__}"
    for match in within:
        assert match[1] == ref
        assert (ROOT / (match[2] or "README.md")).exists()


def test_the_long_description_is_the_readme(description):
    def without_targets(text):
        return re.sub(r"\]\([^)]*\)", "]", text)

    assert without_targets(description).strip() == without_targets((ROOT / "README.md").read_text("utf-8")).strip()
