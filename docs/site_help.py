"""What programs of examples/ answer to --help, as JSON: in one process, for loading torch takes most of the time.

python docs/site_help.py train_clip.py hf_clip.py
"""

import contextlib
import io
import json
import os
import re
import runpy
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def ask(name: str) -> str:
    """The help of one program, from its options on: what stands before them is the docstring."""
    sys.argv = [name, "--help"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        runpy.run_path(name, run_name="__main__")
    options = re.search(r"^\W*options\b", printed.getvalue(), flags=re.MULTILINE)
    if options is None:
        raise SystemExit(f"{name} --help tells of no options")
    return printed.getvalue()[options.start() :].replace(str(Path.home()), "~")


if __name__ == "__main__":
    os.environ |= {"COLUMNS": "76", "NO_COLOR": "1", "TERM": "dumb", "CUDA_VISIBLE_DEVICES": ""}
    os.chdir(EXAMPLES)  # so that they call themselves by their names
    sys.path.insert(0, str(EXAMPLES))
    print(json.dumps({name: ask(name) for name in sys.argv[1:]}))
