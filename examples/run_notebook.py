"""Execute the notebook, show what it prints while it runs, and leave it as .ipynb and .html in a folder.

    python examples/run_notebook.py --output build

With `--in-place` the executed notebook also replaces the committed one. When a cell fails or the kernel dies, what is
there by then is left all the same.
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
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbconvert import HTMLExporter
from user_errors import UserError, one_line

NOTEBOOK = Path(__file__).parent / "flip_vs_glip.ipynb"


class LoudClient(NotebookClient):
    """Repeats what the cells print and return, tables included. Bars move on a terminal, and end up in a file once."""

    pending = ""

    def process_message(self, msg: dict[str, Any], cell: Any, cell_index: int) -> Any:
        if msg["msg_type"] == "stream":
            self._show(msg["content"]["text"])
        elif msg["msg_type"] == "execute_result":
            self._show(f"\n{msg['content']['data']['text/plain']}\n\n")
        return super().process_message(msg, cell, cell_index)

    def _show(self, text: str) -> None:
        if sys.stdout.isatty():
            print(text, end="", flush=True)
            return
        *lines, self.pending = (self.pending + text).split("\n")
        for line in lines:
            print(line.rpartition("\r")[2], flush=True)  # what the line is in the end
        self.pending = self.pending.rpartition("\r")[2]


def execute(notebook: Any, output: Path) -> None:
    """Run the notebook, which gets its outputs, with its results going to `output`.

    Raises:
        UserError: when a cell fails, or the kernel dies.
    """
    output.mkdir(parents=True, exist_ok=True)
    os.environ["GAUSSMASK_OUTPUT"] = str(output.resolve())
    os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # the bars are text, as on the terminal
    client = LoudClient(
        notebook,
        timeout=None,
        kernel_name="python3",
        extra_arguments=["--log-level=ERROR"],  # no warning that the kernel listens on this machine's own port
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOK.parent)}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        raise UserError(f"a cell failed: {error.ename}: {error.evalue}") from error
    except (DeadKernelError, AssertionError) as error:  # the latter of nbclient, which had let go of the kernel before
        raise UserError("the kernel died; it was killed, perhaps for want of memory") from error


def main(output: Path = Path("build"), in_place: bool = False) -> None:
    """Execute the notebook.

    Args:
        output: folder for the executed notebook, its HTML, the pictures and the results.
        in_place: also replace the committed notebook.
    """
    started = time.perf_counter()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    try:
        execute(notebook, output)
    finally:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of day, which change with every run
            for shown in cell.get("outputs", []):
                shown.get("metadata", {}).pop("needs_background", None)  # plot_style reads on any: no box around it
        executed = output / NOTEBOOK.name
        nbformat.write(notebook, executed)
        html, _ = HTMLExporter().from_notebook_node(notebook)
        executed.with_suffix(".html").write_text(html, encoding="utf-8")
        print(f"\n{time.perf_counter() - started:.0f} s; left in {output}:")
        for path in sorted(output.iterdir()):
            print(f"  {path.name}")
    if in_place:
        shutil.copy(executed, NOTEBOOK)


if __name__ == "__main__":
    with one_line("run_notebook.py"):
        tyro.cli(main)
