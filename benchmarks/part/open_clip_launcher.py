"""open_clip's own training program with its own patch dropout, for open_clip_program.py to run.

    python benchmarks/part/open_clip_launcher.py examples/small_clip.json --model small_clip --force-patch-dropout 0.5

As `python -m open_clip_train.main`, of which all flags are, but that it takes the configuration of a model first
(`-` for none), says how many patches the blocks get, and mends what keeps version 3.3 from running at all: with
webdataset 1.0.2 it ends in a KeyError.
"""

import logging
import sys
from pathlib import Path
from typing import Any

if (here := str(Path(__file__).parent)) in sys.path:  # started as a file: clip.py is no package that others mean
    sys.path.remove(here)
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import open_clip
from open_clip_glip import mend_program
from open_clip_train import main as program

PATCHES = "Patches in the blocks: "  # what the log has in front of their number


def main(model_config: str, *flags: str) -> Any:
    """Run open_clip's program; returns what it returns."""
    if model_config != "-":
        open_clip.add_model_config(model_config)
    mend_program()
    create = program.create_model_and_transforms

    def create_and_count(*names: Any, **options: Any) -> Any:
        model, *transforms = create(*names, **options)

        def say(_: Any, inputs: tuple[Any, ...]) -> None:
            logging.info(f"{PATCHES}{inputs[0].shape[1] - 1}")  # the class token is no patch
            hook.remove()

        hook = model.visual.transformer.register_forward_pre_hook(say)
        return model, *transforms

    program.create_model_and_transforms = create_and_count
    return program.main(list(flags))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
