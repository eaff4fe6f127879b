"""The examples of CONTRIBUTING.md: a rule in one file, a host in one line."""

import re
from pathlib import Path

import pytest
import torch
from hosts import ALL
from oracle import TOLERANCE, ask

import gaussmask
from gaussmask.hosts import find, transformers

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")


@pytest.fixture
def rule():
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    session = {}
    exec(compile(block, "CONTRIBUTING.md", "exec"), session)
    return session["BrightPatchDropout"]


@pytest.mark.parametrize("stage", ["tokens", "pixels"])
def test_the_rule_of_the_example_keeps_what_it_says(rule, stage):
    host, drop = ALL["transformers-CLIPVisionModel"], rule(0.5)
    model = gaussmask.attach(host.build(), drop, stage=stage)
    images = torch.zeros(2, 3, 48, 48)
    images[:, :, :, 24:] = 1.5  # the right half, by more than the noise
    model(images)
    assert drop.keep_mask[:, :, 3:].all()
    assert not drop.keep_mask[:, :, :3].any()


def test_the_host_of_the_example_is_what_makes_its_family_work(monkeypatch):
    ((name, row),) = re.findall(r'^ *"(\w+)": (Host\(.*\)),$', TEXT, flags=re.MULTILINE)
    key = f"transformers.{name}"
    known = find.HOSTS[key]
    monkeypatch.setattr(find, "HOSTS", {other: host for other, host in find.HOSTS.items() if other != key})
    with pytest.raises(gaussmask.UnsupportedModelError):
        gaussmask.attach(ALL["transformers-CLIPVisionModel"].build(), gaussmask.RandomPatchDropout(0.5))
    find.HOSTS[key] = eval(row, vars(transformers))
    assert find.HOSTS[key].seam is known.seam
    assert ask(ALL["transformers-CLIPVisionModel"], "half").hidden < TOLERANCE


def test_the_files_that_are_named_are_there():
    root = Path(__file__).parents[1]
    for path in re.findall(r"`((?:src|tests|docs|\.ci|\.github)/[\w./-]+)`", TEXT):
        assert (root / path).exists(), path
