"""docs/hosts.md is in step with the tables that it is written from."""

import sys
from pathlib import Path

from hosts import ALL
from oracle import TOLERANCE

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
from write_hosts import PAGE, parse, render

import gaussmask
from gaussmask.hosts import HOSTS


def test_the_page_is_what_make_hosts_writes():
    """But for what it measures: the oracle's errors and the names of the installed versions."""
    page = PAGE.read_text(encoding="utf-8")
    measured, versions = parse(page)
    assert page == render(measured, versions), "run `make hosts`"
    assert measured.keys() == {key.replace(".", " ") for key in HOSTS}
    assert all(0 < float(row.error) < TOLERANCE for row in measured.values())


def test_the_readme_counts_what_the_page_lists():
    measured, _ = parse(PAGE.read_text(encoding="utf-8"))
    timm_names = sum(int(row.models.split()[0]) for family, row in measured.items() if family.startswith("timm"))
    families = sum(family.startswith("transformers") for family in measured)
    readme = (PAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    assert f"| timm | {timm_names} names:" in readme
    assert f"| transformers | {families} families:" in readme


def test_every_family_has_a_tiny_model():
    assert {gaussmask.describe(host.build()).family for host in ALL.values()} == {
        key.replace(".", " ") for key in HOSTS
    }
