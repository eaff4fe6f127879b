"""The programs of examples/ for those who have no checkout: the wheel carries them beside this file.

    python -m gaussmask_examples.compare_methods --help

They import each other by their plain names (`clip_data`), as they do in a checkout, so importing this package puts
their folder on the path. It needs `pip install "gaussmask[examples]"`.
"""

import sys
from pathlib import Path

_HERE = Path(__file__).parent
_IS_INSTALLED = (_HERE / "clip_training.py").is_file()
FOLDER = _HERE if _IS_INSTALLED else _HERE.parents[1] / "examples"

__path__.append(str(FOLDER))
if str(FOLDER) not in sys.path:
    sys.path.append(str(FOLDER))
