"""Which models take a drop: a table per library, a row per family.

    model --> find.py --> timm.py | open_clip.py | transformers.py: its row, with the seam and the place for it
                     '--> refusals.py: why it cannot be masked

Nothing here imports the libraries; a row goes by the name of a class.
"""

from .find import HOSTS, find_host

__all__ = ["HOSTS", "find_host"]
