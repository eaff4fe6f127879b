"""How the plots of the pages look: without a background, in a grey that can be read on a light and on a dark page.

A page is 688 pixels wide, which is `WIDTH` inches at 100 pixels each; `DPI` is more, for screens that show more.
"""

from typing import Any

WIDTH, DPI = 6.88, 160
GREY = "#7f7f7f"  # lighter by one, and notebooks put a plot without a background on black
STYLE: Any = {  # of matplotlib, whose own types name every setting
    "savefig.facecolor": "none",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.framealpha": 0.0,
    "hatch.linewidth": 0.6,
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    **{f"{name}.color": GREY for name in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{name}": GREY for name in ("edgecolor", "labelcolor", "titlecolor")},
}
