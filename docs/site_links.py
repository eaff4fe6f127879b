"""What is named on a page of the site leads there, and tables that fold know the heads of their columns.

`gaussmask.attach` leads to the API, `tests/test_integrations.py` to the repository, `examples/train_clip.py` to its
page: the first time that a page names it. In `<div class="folds">` every cell gets its column's head, which a narrow
screen shows, and long names of classes get places where they may be broken.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
REPOSITORY = "https://github.com/gaussmask/gaussmask"
PATH = re.compile(
    r"(?:python )?((?:\.ci|\.github|benchmarks|docs|examples|src|tests)/[\w./-]*|noxfile\.py|pyproject\.toml)(?: .*)?"
)
NAME = re.compile(r"(?:gaussmask\.)?((?:functional\.|plot\.)?\w+)(?:\(.*\))?")
KEPT_AS_IT_IS = re.compile(r"(<a\b.*?</a>|<pre\b.*?</pre>|<h\d\b.*?</h\d>)", flags=re.DOTALL)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Finish the HTML of a page."""
    html = re.sub(r'<div class="folds">.*?</div>', lambda match: _foldable(match[0]), html, flags=re.DOTALL)
    if page.file.src_uri == "api.md":  # mkdocstrings links there
        return html
    linked: set[str] = set()

    def link(match: re.Match[str]) -> str:
        target = target_of(match[1], files)
        if target is None or target in linked or target.partition("#")[0] == page.url:
            return match[0]
        linked.add(target)
        url = target if target.startswith("https:") else get_relative_url(target, page.url)
        return f'<a href="{url}">{match[0]}</a>'

    parts = KEPT_AS_IT_IS.split(html)
    parts[::2] = [re.sub(r"<code>([^<]+)</code>", link, part) for part in parts[::2]]
    return "".join(parts)


def target_of(text: str, files: Files) -> str | None:
    """Where inline code leads: a URL in the site or in the repository, or None."""
    if path := PATH.fullmatch(text):
        name = path[1].rstrip("/")
        page = re.sub(r"\.(py|ipynb)$", ".md", name) if name.startswith("examples/") else name.removeprefix("docs/")
        file = files.get_file_from_path("examples/index.md" if name == "examples" else page)
        if file is not None and file.is_documentation_page() and not name.startswith("benchmarks/"):
            return file.url
        if (ROOT / name).exists():
            return f"{REPOSITORY}/{'tree' if (ROOT / name).is_dir() else 'blob'}/main/{name}"
        return None
    name = NAME.fullmatch(text)
    return api().get(name[1]) if name else None


def api() -> dict[str, str]:
    """By name, where docs/api.md documents it."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"^::: (\S+)\n    options:\n      heading: gaussmask\.(\w+)$", page, flags=re.MULTILINE)
    places = {name: f"api/#{place}" for place, name in found}
    for module in ("functional", "plot"):
        text = (ROOT / "src" / "gaussmask" / f"{module}.py").read_text(encoding="utf-8")
        listed = re.search(r"__all__ = \[(.*?)\]", text, flags=re.DOTALL)
        names = (
            re.findall(r'"(\w+)"', listed[1]) if listed else re.findall(r"^def ([a-z]\w*)\(", text, flags=re.MULTILINE)
        )
        places |= {f"{module}.{name}": f"api/#gaussmask.{module}.{name}" for name in names}
    return places


def _foldable(html: str) -> str:
    """Tables whose cells know the heads of their columns."""

    def with_heads(table: re.Match[str]) -> str:
        heads = re.findall(r"<th\b[^>]*>(.*?)</th>", table[0])
        count = iter(range(table[0].count("<td")))

        def cell(match: re.Match[str]) -> str:
            content = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", "<wbr>", match[2])
            return f'<td{match[1]} data-head="{heads[next(count) % len(heads)]}">{content}</td>'

        return re.sub(r"<td\b([^>]*)>(.*?)</td>", cell, table[0], flags=re.DOTALL)

    return re.sub(r"<table>.*?</table>", with_heads, html, flags=re.DOTALL)
