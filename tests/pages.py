"""The code on the pages of the documentation."""

import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)


def blocks(text):
    """Of code, in order: (language, text)."""
    return [(match["language"], textwrap.dedent(match["text"])) for match in BLOCK.finditer(text)]


def run(found, name, read_printed):
    """Run the Python among blocks in one session, as a reader would paste it; what it prints must be shown below it."""
    session = {}
    for (language, text), (next_language, shown) in zip(found, [*found[1:], (None, "")], strict=True):
        if language == "python":
            exec(compile(text, name, "exec"), session)
            printed = read_printed()
            claimed = [line.partition("  # ")[2] for line in text.splitlines() if line.startswith("print(")]
            if any(claimed):
                claimed = [shape for line in claimed for shape in re.findall(r"\(\d[\d, ]*\)", line)]
                assert claimed == [f"({shape})" for shape in re.findall(r"torch\.Size\(\[([\d, ]*)\]\)", printed)]
            elif next_language == "" or "print(" in text:  # what libraries print by themselves is not shown
                assert printed == (shown if next_language == "" else ""), text
    return session
