"""Print what CHANGELOG.md says about the version of a tag; fail where a tag and the version it is set on differ.

python .ci/release_notes.py v1.2.3
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def find_notes(tag: str, pyproject: str, changelog: str) -> str:
    """The section of the tag's version, without its heading."""
    version = re.search(r'^version = "(.*)"$', pyproject, flags=re.MULTILINE)
    if version is None or tag != f"v{version[1]}":
        raise SystemExit(f"the tag is {tag}, but the version in pyproject.toml is {version and version[1]}")
    section = re.search(rf"^## \[{re.escape(version[1])}\].*\n((?:(?!## |\[).*\n?)*)", changelog, flags=re.MULTILINE)
    if section is None or not section[1].strip():
        raise SystemExit(f"CHANGELOG.md says nothing about {version[1]}")
    return section[1].strip()


if __name__ == "__main__":
    print(find_notes(sys.argv[1], *((ROOT / name).read_text("utf-8") for name in ("pyproject.toml", "CHANGELOG.md"))))
