"""The Python of the README and of the docs, as written, and what it prints."""

import copy
import re
import sys
from pathlib import Path

import draw_masks
import matplotlib as mpl
import pytest
import torch
from pages import ROOT, blocks, run
from PIL import Image
from torch import nn

from gaussmask import PatchDropout

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import draw_method

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BY_SECTION = {"integrations.md"}  # run by test_integrations.py: not every section's library is installed everywhere


def blocks_of(page):
    return blocks(page.read_text(encoding="utf-8"))


PAGES_HERE = [page for page in PAGES if page.name not in BY_SECTION]
WITH_PYTHON = [page for page in PAGES_HERE if any(language == "python" for language, _ in blocks_of(page))]


def test_there_are_pages_with_python():
    assert {page.name for page in WITH_PYTHON} >= {"README.md", "index.md", "method.md", "recipes.md"}


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_runs_and_prints_what_is_shown_below_it(page, capsys):
    """The blocks of a page run one after the other in one session, as a reader would paste them."""
    mpl.use("Agg")
    run(blocks_of(page), str(page), lambda: capsys.readouterr().out)


def test_copies_of_the_models_of_the_recipes_are_copies(capsys):
    """A deep copy in eval mode, as a teacher is one, drops nothing and leaves the draw of its original alone."""
    session = run(blocks_of(ROOT / "docs" / "recipes.md"), "recipes.md", lambda: capsys.readouterr().out)
    models = {
        name: value
        for name, value in session.items()
        if isinstance(value, nn.Module) and not isinstance(value, PatchDropout) and drops_of(value)
    }
    assert {"model", "tiny", "vit", "large", "video_model"} <= models.keys()
    inputs = {
        "tiny": (4, 3, 32, 32),
        "vit": (4, 3, 32, 32),
        "large": (2, 3, 320, 320),
        "video_model": (2, 8, 3, 32, 32),
    }
    for name, model in models.items():
        model.train()(torch.randn(inputs.get(name, (8, 3, 160, 160))))
        (drop,), (own,) = drops_of(model), drops_of(twin := copy.deepcopy(model))
        kept = drop.keep_indices
        assert own is not drop, name
        twin.eval()(torch.randn(inputs.get(name, (8, 3, 160, 160))))
        assert own.keep_indices is None, name
        assert drop.keep_indices is kept, name
        assert kept is not None, name
        twin.train()(torch.randn(inputs.get(name, (8, 3, 160, 160))))
        assert own.keep_indices is not None, name
        assert drop.keep_indices is kept, name


def drops_of(model):
    return [module for module in model.modules() if isinstance(module, PatchDropout)]


def test_the_pictures_are_there_and_the_commands_beside_them_draw_them(tmp_path):
    for page in PAGES:
        for picture in re.findall(r"!\[[^\]]+\]\((?!https:)([^)]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / picture).is_file()
    draw_masks.main(output=tmp_path / "masks.webp", steps=3)
    with Image.open(tmp_path / "masks.webp") as drawn, Image.open(ROOT / "docs" / "masks.webp") as shown:
        assert drawn.size == shown.size
        assert drawn.n_frames == 3
        assert shown.n_frames == 12
    assert {f"{name}.png" for name in draw_method.PICTURES} == {path.name for path in draw_method.FOLDER.iterdir()}
    assert draw_method.PICTURES["cost"]().axes
