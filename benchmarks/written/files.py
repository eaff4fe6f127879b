"""Files that are whole whenever the program that writes them is interrupted."""

import json
from pathlib import Path
from typing import Any


def write_at_once(file: Path, text: str) -> None:
    """The old text stands until the new one is complete."""
    fresh = file.with_suffix(".part")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(file)


def save(results: dict[str, Any], file: Path) -> None:
    """As JSON, which knows no nan."""
    write_at_once(file, json.dumps(results, indent=1, allow_nan=False) + "\n")
