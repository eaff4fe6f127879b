"""The versions that pyproject.toml admits are the ones that noxfile.py installs."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(line) for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines]
LOWEST = {need.name: need for need in REQUIRED if need.name != PROJECT["name"]}
OLDEST = [Requirement(line) for line in (ROOT / ".ci" / "oldest.txt").read_text("utf-8").splitlines() if line[0] != "#"]


def only_version(requirement, operator):
    (specifier,) = requirement.specifier
    assert specifier.operator == operator, requirement
    return Version(specifier.version)


def test_the_oldest_versions_are_the_lower_bounds():
    lower = {name: only_version(need, ">=") for name, need in LOWEST.items()}
    assert {need.name: only_version(need, "==") for need in OLDEST} == lower


def test_one_library_has_one_bound():
    for need in REQUIRED:
        assert need.name not in LOWEST or need == LOWEST[need.name]


def test_the_pythons_that_are_named_begin_with_the_lower_bound():
    named = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", line)]
    assert named == sorted(named, key=Version)
    assert PROJECT["requires-python"] == f">={named[0]}"


def test_every_extra_is_tried_alone():
    tried = runpy.run_path(str(ROOT / ".ci" / "extras.py"))
    assert tried["BRINGS"].keys() == tried["USES"].keys() == EXTRAS.keys()


def test_citation_changelog_and_readme_have_the_version_and_its_date():
    """Of the last release, while a later version is in the making."""
    citation, changelog, readme = (
        (ROOT / name).read_text("utf-8") for name in ("CITATION.cff", "CHANGELOG.md", "README.md")
    )
    version, date = re.search(r"^## \[(\d[^\]]*)\] - (\d{4}-\d\d-\d\d)$", changelog, flags=re.MULTILINE).groups()
    assert f"\nversion: {version}\ndate-released: {date}\n" in citation
    assert f"\n[{version}]: https://github.com/gaussmask/gaussmask/releases/tag/v{version}\n" in changelog
    assert f"[{version}](CHANGELOG.md)" in readme
    assert PROJECT["version"] == version or (
        Version(PROJECT["version"]).is_devrelease and Version(PROJECT["version"]) > Version(version)
    )
    assert find_notes(f"v{version}", f'version = "{version}"', changelog)


# The notes of a release

find_notes = runpy.run_path(str(ROOT / ".ci" / "release_notes.py"))["find_notes"]
CHANGELOG = """# Changelog

## [Unreleased]

## [1.1.0] - 2027-02-01

### Added

- One.

## [1.0.0] - 2027-01-01

- Zero.

[1.0.0]: https://example.org
"""


def test_notes_are_the_section_of_the_version():
    assert find_notes("v1.1.0", 'version = "1.1.0"', CHANGELOG) == "### Added\n\n- One."
    assert find_notes("v1.0.0", 'version = "1.0.0"', CHANGELOG) == "- Zero."


@pytest.mark.parametrize(("tag", "version"), [("v1.1.0", "1.0.0"), ("v1.2.0", "1.2.0"), ("v1x1.0", "1x1.0")])
def test_a_release_without_its_version_or_its_notes_fails(tag, version):
    with pytest.raises(SystemExit, match=r"the tag is|says nothing"):
        find_notes(tag, f'version = "{version}"', CHANGELOG)
