"""Attach a drop to a model, find it again, and take it off."""

import warnings
from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from .drops import PatchDropout
from .hosts import find_host
from .seams.host import Place
from .seams.link import take_off
from .seams.seam import Seam
from .seams.unsupported import UnsupportedModelError

ModelT = TypeVar("ModelT", bound=nn.Module)

STAGES = ("auto", "tokens", "pixels")


def find_place(model: nn.Module) -> Place:
    """Where in `model` a drop would go; raises what `attach` raises for the model alone."""
    check_model(model)
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise ValueError(
                f"{type(module).__name__} is compiled, and the compiler does not see what is attached later: "
                "attach first, compile second"
            )
    return find_host(model)


def attach(model: ModelT, drop: PatchDropout, *, stage: str = "auto") -> ModelT:
    """Let the vision tower of `model` drop patches, in place.

    The class, config, state_dict and forward signature of the model do not change. The drop takes the tower's current
    mode, training or eval, and follows `model.train()` and `model.eval()` from then on. Attaching again replaces.
    Attach before `torch.compile`; deep copies and pickles of the model carry a drop of their own (`attached`).
    `gaussmask.describe(model)` tells beforehand what this will do.

    Args:
        model: a ViT of timm, transformers or open_clip, or any module that contains one such vision tower.
        drop: a drop that no other model carries.
        stage: `"auto"` drops pixels where that gives the same tokens, and tokens otherwise, forward by forward
            (`describe` tells which, and why). `"tokens"` drops the embedded tokens, at the host's own seam. `"pixels"`
            drops before the embedding: only the kept patches are cut from the image and projected, and the tensor of
            all tokens is never made. The draws are the same for the same seed, and outputs and gradients too, but for
            rounding. Hosts whose tokens are more than a linear map of their patch plus something common to all images
            raise. In a forward of the model the embedding modules see one blank image in place of the batch.

    Returns:
        `model`.

    Warns:
        UserWarning: where the tower is in eval mode, as `from_pretrained` returns it: nothing is dropped until
            `model.train()`.

    Raises:
        UnsupportedModelError: for a model that cannot be masked, or not at this `stage`, with the reason. Also by a
            forward, where only the call shows that pixels cannot be dropped (dropout on the embeddings that was turned
            on later, positions that differ from image to image, a projection that was replaced or sharded by itself),
            or where embedded patches went on without being dropped (a forward of your own that calls the parts).
        ValueError: for a compiled model, a drop that another model carries, a drop whose own `num_prefix_tokens`
            contradicts the model's, or an unknown `stage`.
        TypeError: for a `drop` that is no `PatchDropout`, or whose class overrides more than `scores`; for a `model`
            that is no module.
    """
    if not isinstance(drop, PatchDropout):
        raise TypeError(f"drop must be a gaussmask.PatchDropout, got {_what(drop)}")
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(map(repr, STAGES))}, got {stage!r}")
    check_rule(drop)
    place = find_place(model)
    carrier = drop._seam() if drop._seam is not None else None
    if carrier is not None and not any(carrier is seam for seam in seams_of(model)):
        raise ValueError(
            f"this {type(drop).__name__} is attached to another model: detach it there, or make one drop per model"
        )
    seam = place.host.seam(drop, place, stage)
    seam.check(place)
    detach(model)
    try:
        seam.install(place)
        seam.watch_forward(place)
    except UnsupportedModelError:  # a host of another version than those that are known
        seam.remove()
        raise
    tower = seam.seat(place)
    seam.train(tower.training)
    if not tower.training:
        warnings.warn(
            f"{place.name} is in eval mode, as from_pretrained returns a model, so that {type(drop).__name__} is idle: "
            "nothing is dropped until model.train() (or drop.train(), for masked inference)",
            stacklevel=2,
        )
    return model


def detach(model: ModelT) -> ModelT:
    """Take off what `attach` put on, and leave `model` exactly as it was; a model without a drop stays as it is.

    Returns:
        `model`.

    Raises:
        TypeError: for a `model` that is no module, or is the drop itself.
    """
    check_model(model)
    for seam in list(seams_of(model)):
        seam.remove()
    for module in model.modules():  # of a copy, where the seam knows of none; and what a copy of a part was left with
        take_off(module)
    return model


def attached(model: nn.Module) -> PatchDropout | None:
    """The drop that `model` carries, or None: also of a deep copy, an unpickled, wrapped or compiled model.

    Raises:
        ValueError: where `model` carries more than one, each in a tower of its own.
        TypeError: for a `model` that is no module, or is the drop itself.
    """
    check_model(model)
    seams = list(seams_of(model))
    if len(seams) > 1:
        towers = " and ".join(seam.host_name for seam in seams)
        raise ValueError(f"{type(model).__name__} carries {len(seams)} drops ({towers}): ask each tower by itself")
    return seams[0].drop if seams else None


def check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        way_out = ""
        if isinstance(model, tuple) and any(isinstance(part, nn.Module) for part in model):
            way_out = ": pass the model alone (open_clip.create_model_and_transforms returns its transforms too)"
        raise TypeError(f"model must be a torch.nn.Module, got {_what(model)}{way_out}")
    if isinstance(model, PatchDropout):
        raise TypeError(f"model must be the model that carries the drop, got the {type(model).__name__} itself")


def check_rule(drop: PatchDropout) -> None:
    """Raise where a subclass writes no scores, or more than them: an attached model asks `draw` of the base class."""
    if "_seam" not in vars(drop):
        raise TypeError(
            f"the __init__ of {type(drop).__name__} did not call super().__init__(mask_ratio), so it has no settings"
        )
    if type(drop).scores is PatchDropout.scores and "scores" not in vars(drop):
        raise TypeError(
            f"{type(drop).__name__} has no scores: define scores(self, coords, generator=None) -> (B, N), or take one "
            "of the ready-made drops"
        )
    for name in ("forward", "draw"):
        if name in vars(drop) or getattr(type(drop), name) is not getattr(PatchDropout, name):
            raise TypeError(
                f"{type(drop).__name__} overrides {name}, which an attached model would not call: write scores alone, "
                "and let it ask for what it needs by name (pixels, tokens, grid_size), "
                "def scores(self, coords, generator=None, *, pixels)"
            )


def _what(value: object) -> str:
    return f"the class {value.__name__}, not an instance" if isinstance(value, type) else type(value).__name__


def seams_of(model: nn.Module) -> Iterator[Seam]:
    return (module for module in model.modules() if isinstance(module, Seam))
