"""What `make demo` shows and leaves, also when a cell fails or the kernel dies."""

import nbformat
import pytest
import run_notebook
from user_errors import UserError

BARS = "for step in range(3): print(f'\\rbar {step}', end='', flush=True)\nprint()\n7"


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    def write(*cells):
        content = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        nbformat.write(content, tmp_path / "small.ipynb")
        monkeypatch.setattr(run_notebook, "NOTEBOOK", tmp_path / "small.ipynb")
        return tmp_path / "out"

    return write


def outputs(folder):
    return [cell.outputs for cell in nbformat.read(folder / "small.ipynb", as_version=4).cells]


def test_a_file_gets_the_end_of_a_bar_and_a_terminal_all_of_it(notebook, capsys, monkeypatch):
    folder = notebook(BARS)
    run_notebook.main(folder)
    shown = capsys.readouterr().out
    assert shown.startswith("bar 2\n\n7\n")
    assert "\r" not in shown
    assert (folder / "small.html").read_text().count("bar 2") >= 1
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    run_notebook.main(folder)
    assert "\rbar 0\rbar 1\rbar 2\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1 / 0", "a cell failed: ZeroDivisionError: division by zero"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "the kernel died; it was killed"),
    ],
)
def test_what_was_done_is_left(notebook, capfd, cell, message):
    folder = notebook("print('done')", cell, "print('never')")
    with pytest.raises(UserError, match=message):
        run_notebook.main(folder)
    assert outputs(folder)[0][0].text == "done\n"
    assert outputs(folder)[2] == []
    assert (folder / "small.html").exists()
    seen = capfd.readouterr()
    assert "never" not in seen.out
    assert "IPKernelApp" not in seen.err
