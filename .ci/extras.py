"""Try an extra alone: what it brings and what not, and one use of it.

python .ci/extras.py timm
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import gaussmask

EXAMPLES = Path(__file__).parents[1] / "examples"
PROGRAMS = ("compare_methods.py", "hf_clip.py", "open_clip_glip.py", "train_clip.py", "training_cost.py")
EVERYTHING = {"matplotlib", "open_clip", "timm", "transformers"}
BRINGS = {
    "timm": {"timm"},
    "transformers": {"transformers"},
    "open-clip": {"open_clip", "timm"},
    "plot": {"matplotlib"},
    "examples": EVERYTHING,
    "all": EVERYTHING,
}


def attach(model: Any) -> None:
    drop = gaussmask.GaussianPatchDropout(0.5)
    gaussmask.attach(model, drop)
    model(torch.randn(2, 3, 64, 64))
    assert drop.keep_indices is not None
    assert drop.keep_indices.shape == (2, 8)


def try_timm() -> None:
    import timm

    attach(timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2))


def try_transformers() -> None:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=64)
    attach(ViTModel(config).train())


def try_open_clip() -> None:
    import open_clip

    tower = {"image_size": 64, "patch_size": 16, "width": 64, "head_width": 32, "layers": 2}
    text = {"vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    attach(open_clip.CLIP(16, tower, text).visual)


def try_plot() -> None:
    import matplotlib as mpl

    mpl.use("agg")
    gaussmask.plot.keep_probability((4, 4), 0.5, sigma=0.2).figure.canvas.draw()


def try_examples() -> None:
    for program in PROGRAMS:
        subprocess.run([sys.executable, EXAMPLES / program, "--help"], check=True, stdout=subprocess.DEVNULL)


def try_all() -> None:
    for use in (try_timm, try_transformers, try_open_clip, try_plot, try_examples):
        use()


USES = {
    "timm": try_timm,
    "transformers": try_transformers,
    "open-clip": try_open_clip,
    "plot": try_plot,
    "examples": try_examples,
    "all": try_all,
}

if __name__ == "__main__":
    extra = sys.argv[1]
    brought = {name for name in EVERYTHING if find_spec(name)}
    assert brought == BRINGS[extra], f"{extra} brings {brought}"
    USES[extra]()
    print(f"{extra}: works alone")
