"""Pages that are made while the site is built: the examples, one for each program, and the notebook.

They are made of `examples/`: README.md, the first lines of every program and what it answers to `--help`, and the
executed notebook. `docs/site_help.py` asks the programs; its answers lie in build/ until a program changes.
"""

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "flip_vs_glip.ipynb"
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
SOURCE = "https://github.com/gaussmask/gaussmask/blob/main"
COLAB = "https://colab.research.google.com/github/gaussmask/gaussmask/blob/main"
log = get_plugin_logger("examples")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; `config` is that of mkdocs.yml, whose navigation must name all of them."""
    readme = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    pages: dict[str, str | bytes] = {"examples/index.md": with_links(readme, EXAMPLES)}
    said = answers()
    for name in PROGRAMS:
        pages[page_of(name)] = program_page(name, said[name], readme)
    pages |= notebook_pages()
    pages |= {
        f"examples/{picture}": (EXAMPLES / picture).read_bytes()
        for picture in re.findall(r"!\[[^\]]*\]\(([\w-]+\.png)\)", readme)
    }
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
        if uri.endswith(".md") and uri not in str(config.nav):
            log.warning(f"{uri} is not in the navigation: add it to `nav` of mkdocs.yml")
    return files


def page_of(name: str) -> str:
    """The page of a program or of the notebook."""
    return f"examples/{Path(name).stem}.md"


def program_page(name: str, help_text: str, readme: str) -> str:
    """What it is for, where more about it stands, and its options."""
    source = (EXAMPLES / name).read_text(encoding="utf-8")
    doc = re.match(r'r?"""(.*?)"""', source, flags=re.DOTALL)[1]  # type: ignore[index]  # ruff demands one
    title, _, rest = doc.replace("\\\\\n", "\\\n").strip().partition("\n\n")
    sections = [heading for heading, text in _sections(readme) if name in text]
    more = ", ".join(f"[{heading}](index.md#{slug(heading)})" for heading in sections)
    about = [f"[Source]({SOURCE}/examples/{name})"] + ([f"more about it: {more}"] if more else [])
    parts = [f"# {name}", " ".join(title.split()), "; ".join(about) + ".", rest, "## Options", _fenced(help_text)]
    return "\n\n".join(parts) + "\n"


def notebook_pages() -> dict[str, str | bytes]:
    """The notebook as it was executed, and its pictures."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_links(cell.source, EXAMPLES)
    text, resources = MarkdownExporter().from_notebook_node(notebook, {"unique_key": NOTEBOOK.stem})
    place = NOTEBOOK.relative_to(ROOT)
    about = (
        f"The notebook, as it was executed. [Open it in Colab]({COLAB}/{place}), or take [the file]({SOURCE}/{place})."
    )
    title, _, rest = text.strip().partition("\n")
    text = re.sub(r"<style scoped>.*?</style>\n?", "", f"{title}\n\n{about}\n{rest}\n", flags=re.DOTALL)
    text = re.sub(r"!\[png\]\(", "![What the cell draws](", text).replace(
        '<table border="1" class="dataframe">', "<table>"
    )
    pictures = {f"examples/{name}": content for name, content in resources["outputs"].items()}
    return {page_of(NOTEBOOK.name): text, **pictures}


def with_links(text: str, folder: Path) -> str:
    """Markdown whose links lead from a page in examples/ to where it is on the site, or else to the repository."""

    def target(match: re.Match[str]) -> str:
        path, _, anchor = match[2].partition("#")
        place = (folder / path).resolve().relative_to(ROOT)
        if not (ROOT / place).exists():
            log.warning(f"examples/ links to {match[2]}, which is not there")
        if place.suffix == ".png" and place.parts[0] == "examples":
            return match[0]
        if place.parts[0] == "docs" and place.suffix == ".md":
            found = f"../{place.relative_to('docs')}"
        elif place.parts[0] == "examples" and (place.name in PROGRAMS or place.name == NOTEBOOK.name):
            found = Path(page_of(place.name)).name
        else:
            found = f"{SOURCE}/{place}"
        return f"{match[1]}({found}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"(\])\((?!https?:|#)([^)\s]+)\)", target, text)


def slug(heading: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower())


def _sections(readme: str) -> list[tuple[str, str]]:
    """Heading and text of every section of the second level and the third."""
    parts = re.split(r"^#{2,3} (.+)\n", readme, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _fenced(text: str) -> str:
    return f"```text\n{text.strip()}\n```"


def answers() -> dict[str, str]:
    """By program, what it answers to --help."""
    sources = sorted([*EXAMPLES.glob("*.py"), Path(__file__).with_name("site_help.py")])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    kept = ROOT / "build" / "site-help.json"
    if kept.is_file():
        known: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        if known["digest"] == digest:
            return known["said"]
    log.info("asking the programs of examples/ for their options")
    command = [sys.executable, str(Path(__file__).with_name("site_help.py")), *PROGRAMS]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(json.dumps({"digest": digest, "said": said}), encoding="utf-8")
    return said
