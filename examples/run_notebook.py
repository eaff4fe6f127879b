"""Execute the notebook, show what it prints while it runs, and leave it as .ipynb and .html in a folder.

    python examples/run_notebook.py --output build

With `--in-place` the executed notebook also replaces the committed one.
"""

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
import tyro
from nbclient import NotebookClient
from nbconvert import HTMLExporter

NOTEBOOK = Path(__file__).parent / "flip_vs_glip.ipynb"


class LoudClient(NotebookClient):
    """Repeats on the terminal what the cells print and return, progress bars and tables included."""

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] == "stream":
            print(msg["content"]["text"], end="", flush=True)
        elif msg["msg_type"] == "execute_result":
            print(f"\n{msg['content']['data']['text/plain']}\n", flush=True)
        return super().process_message(msg, cell, cell_index)


def execute(output: Path) -> Any:
    """Run the notebook with its results going to `output`; returns it with its outputs."""
    output.mkdir(parents=True, exist_ok=True)
    os.environ["GAUSSMASK_OUTPUT"] = str(output.resolve())
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # the bars are text, as on the terminal
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = LoudClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    client.execute()
    return notebook


def main(output: Path = Path("build"), in_place: bool = False) -> None:
    """Execute the notebook.

    Args:
        output: folder for the executed notebook, its HTML, the pictures and the results.
        in_place: also replace the committed notebook.
    """
    started = time.perf_counter()
    notebook = execute(output)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day, which change with every run
    executed = output / NOTEBOOK.name
    nbformat.write(notebook, executed)
    html, _ = HTMLExporter().from_notebook_node(notebook)
    executed.with_suffix(".html").write_text(html, encoding="utf-8")
    if in_place:
        shutil.copy(executed, NOTEBOOK)
    print(f"\n{time.perf_counter() - started:.0f} s; left in {output}:")
    for path in sorted(output.iterdir()):
        print(f"  {path.name}")


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
