"""The GitHub workflows: nothing that moves under them, no right that they don't need, no command that isn't there."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEXTS = {path.name: path.read_text("utf-8") for path in FILES}
WORKFLOWS = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
JOBS = [(name, job) for name, workflow in WORKFLOWS.items() for job in workflow["jobs"]]


def test_every_action_is_pinned_to_one_commit():
    used = [line for text in TEXTS.values() for line in text.splitlines() if "uses:" in line]
    pins = [re.fullmatch(r"\s*- uses: ([\w./-]+)@([0-9a-f]{40}) # (v[\d.]+)", line) for line in used]
    assert used
    assert all(pins), [line for line, pin in zip(used, pins, strict=True) if not pin]
    commits = {pin.groups() for pin in pins}
    assert len(commits) == len({action for action, _, _ in commits})


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_read_and_no_two_of_its_runs_get_in_each_others_way(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    assert WORKFLOWS[name]["concurrency"]["group"]


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_a_job_ends_and_writes_only_where_it_releases(name, job):
    settings = WORKFLOWS[name]["jobs"][job]
    assert settings["timeout-minutes"] <= 180
    rights = {
        "release.yml": {"publish": {"id-token": "write"}, "announce": {"contents": "write"}},
        "docs.yml": {"deploy": {"contents": "write"}},
    }
    assert settings.get("permissions") == rights.get(name, {}).get(job)


@pytest.mark.parametrize(("name", "job"), JOBS)
def test_checkouts_leave_no_credentials_behind(name, job):
    for step in WORKFLOWS[name]["jobs"][job]["steps"]:
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_every_command_is_there():
    makefile, noxfile = ((ROOT / name).read_text("utf-8") for name in ("Makefile", "noxfile.py"))
    text = "\n".join(TEXTS.values())
    for target in re.findall(r"run: make (\S+)", text):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    for session in re.findall(r"(?:nox -s|session:) (\w+)", text):
        assert f"def {session}(" in noxfile
    for script in re.findall(r"python (\S+\.py)", text):
        assert (ROOT / script).exists()
