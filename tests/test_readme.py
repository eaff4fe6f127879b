"""The README's Python, as written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2


SHAPES = [snippet for snippet in SNIPPETS if ".shape" in snippet]
SHOWN = re.findall(r"```python\n([^`]*)```\n\n```\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_every_snippet_is_tried():
    assert sorted(SNIPPETS) == sorted(SHAPES + [snippet for snippet, _ in SHOWN])


@pytest.mark.parametrize(("snippet", "shown"), SHOWN)
def test_snippet_prints_what_is_shown_below_it(snippet, shown, capsys):
    exec(compile(snippet, str(README), "exec"), {})
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("snippet", SHAPES)
def test_snippet_prints_the_shapes_that_its_comments_claim(snippet, capsys):
    exec(compile(snippet, str(README), "exec"), {})
    printed = capsys.readouterr().out
    claimed = [
        shape
        for line in snippet.splitlines()
        if line.startswith("print(")
        for shape in re.findall(r"\(\d[\d, ]+\)", line.partition("#")[2])
    ]
    assert claimed
    assert all(f"torch.Size([{shape.strip('()')}])" in printed for shape in claimed)
