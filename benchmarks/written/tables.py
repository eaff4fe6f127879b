"""Tables in Markdown, and the places of pages that they are put into."""

import re
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parents[1] / "results"  # what the tables of the repository's pages are made of


def markdown(table: pd.DataFrame) -> str:
    """Without the padding of the columns, which would change every line when one cell does."""
    padded: str = table.to_markdown(index=False, disable_numparse=True)
    return re.sub(r" {2,}\|", " |", re.sub(r":?-{3,}:?", "---", padded))


def fill(page: str, named: dict[str, str]) -> str:
    """`page` with every text between the markers of its name; other markers, and texts without markers, are left."""

    def between(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- results: {name} -->\n\n{named[name]}\n\n<!-- end -->" if name in named else match[0]

    return re.sub(r"<!-- results: (?P<name>\S+) -->\n.*?<!-- end -->", between, page, flags=re.DOTALL)
