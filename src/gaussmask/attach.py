"""Attach a drop to a model, find it again, and take it off."""

import re
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

from torch import nn

from .dropout import PatchDropout
from .hosts import HOSTS, HookSeam, Host, Seam, UnsupportedModelError

ModelT = TypeVar("ModelT", bound=nn.Module)

STAGES = ("tokens",)

# Models that contain a supported tower and do with its tokens what fewer tokens make wrong.
REFUSED_OWNERS = [
    (
        r"^transformers\..*(Backbone|Segmentation|ObjectDetection|DepthEstimation|KeypointDetection|Matting)",
        "it lays the tokens out as a dense map, which dropped patches leave with holes",
    ),
    (
        r"^transformers\..*(MaskedImageModeling|ForPreTraining)",
        "its loss compares every patch of the image, also the dropped ones: attach to the encoder inside it",
    ),
]
IMAGE_TOKENS = "its language model reserves a place for every patch: attach to its vision tower and train that alone"

# Why well-known families without a row in HOSTS have none.
REFUSED_FAMILIES = [
    (
        r"^(timm|transformers)\.(Swin|Donut|MaxxVit|GlobalContextVit|DaViT|Twins|Nest|HieraDet|Sam|VisionTransformerSAM)",
        "it attends within windows of the full grid",
    ),
    (
        r"^(timm|transformers)\.(Hiera|MultiScaleVit|Pvt|Pyramid|PoolingVisionTransformer|CoaT|Levit|CrossViT|VOLO"
        r"|Segformer|FocalNet|EfficientFormer|Xcit|TNT|Visformer)",
        "it is hierarchical or convolves over the full grid",
    ),
    (r"^timm\.(MlpMixer|ResMlp|Sequencer)", "it mixes tokens by weights of a fixed number of patches"),
    (r"^timm\.ConVit$", "its position attention is computed from the number of tokens"),
    (r"^(timm|transformers)\.ViTMAE", "it masks by itself: set config.mask_ratio"),
    (
        r"^(timm|transformers)\.(Beit|Data2VecVision|VisionTransformerRelPos|Cait|Siglip2|Yolos|VideoMAE|Vivit|VJEPA2)",
        "its position bias, mask or token layout needs more than one seam, which this version does not have",
    ),
]


class Place(NamedTuple):
    """Where in a model a host was found."""

    host: Host
    module: nn.Module
    owners: tuple[nn.Module, ...]  # outermost first

    @property
    def parent(self) -> nn.Module | None:
        return self.owners[-1] if self.owners else None

    @property
    def name(self) -> str:
        """The class that a user knows: of the model, where the host is its embedding module."""
        tower = self.parent if issubclass(self.host.seam, HookSeam) and self.parent is not None else self.module
        return type(tower).__name__


def attach(model: ModelT, drop: PatchDropout, *, stage: str = "tokens") -> ModelT:
    """Let the vision tower of `model` drop patches, in place.

    The class, config, state_dict and forward signature of the model do not change. The drop takes the tower's current
    mode (training or eval) and follows `model.train()` and `model.eval()` from then on. Attaching again replaces.
    Attach before `torch.compile`; deep copies and pickles of the model carry a drop of their own (`attached`).

    Args:
        model: a ViT of timm, transformers or open_clip, or any module that contains one such vision tower.
        drop: a drop that no other model carries.
        stage: `"tokens"` drops the embedded tokens, at the host's own seam.

    Returns:
        `model`.

    Raises:
        UnsupportedModelError: for a model that cannot be masked, with the reason.
        ValueError: for a compiled model, a drop that another model carries, a drop whose own `num_prefix_tokens`
            contradicts the model's, or an unknown `stage`.
        TypeError: for a `drop` that is no `PatchDropout`.
    """
    if not isinstance(drop, PatchDropout):
        raise TypeError(f"drop must be a gaussmask.PatchDropout, got {type(drop).__name__}")
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {', '.join(map(repr, STAGES))}, got {stage!r}")
    for module in model.modules():
        if type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None:
            raise ValueError(
                f"{type(module).__name__} is compiled, and the compiler does not see what is attached later: "
                "attach first, compile second"
            )
    place = find_host(model)
    carrier = drop._seam() if drop._seam is not None else None
    if carrier is not None and not any(carrier is seam for _, _, seam in _seams(model)):
        raise ValueError(
            f"this {type(drop).__name__} is attached to another model: detach it there, or make one drop per model"
        )
    host, module, _ = place
    seam = host.seam(drop, host.num_prefix_tokens(module), place.name)
    seam.check(place.parent)
    detach(model)
    seam.install(module, place.parent, host.slot, host.grid_source)
    seam.train(module.training)
    return model


def detach(model: ModelT) -> ModelT:
    """Take off what `attach` put on, and leave `model` exactly as it was; a model without a drop stays as it is.

    Returns:
        `model`.
    """
    for module, slot, seam in list(_seams(model)):
        seam.remove(module, slot)
    return model


def attached(model: nn.Module) -> PatchDropout | None:
    """The drop that `model` carries, or None: also of a deep copy, an unpickled, wrapped or compiled model."""
    return next((seam.drop for _, _, seam in _seams(model)), None)


def _seams(model: nn.Module) -> Iterator[tuple[nn.Module, str, Seam]]:
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, Seam):
                yield module, name, child


def _names(module: nn.Module) -> list[str]:
    """`library.Class` for the class of `module` and its bases."""
    return [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(module).__mro__]


def _reason(module: nn.Module, table: list[tuple[str, str]]) -> str | None:
    return next((why for name in _names(module) for pattern, why in table if re.search(pattern, name)), None)


def _places(module: nn.Module, owners: tuple[nn.Module, ...] = ()) -> Iterator[Place]:
    """The hosts in `module`, outermost only."""
    host = next((HOSTS[name] for name in _names(module) if name in HOSTS), None)
    if host is not None:
        yield Place(host, module, owners)
        return
    for child in module.children():
        yield from _places(child, (*owners, module))


def find_host(model: nn.Module) -> Place:
    """The one vision tower of `model` that can be masked; raises UnsupportedModelError where there is none."""
    places = list({id(place.module): place for place in _places(model)}.values())
    if len(places) > 1:
        towers = " and ".join(place.name for place in places)
        raise UnsupportedModelError(
            f"{type(model).__name__} has more than one vision tower ({towers}): attach to each by itself"
        )
    if not places:
        for module in model.modules():
            if why := _reason(module, REFUSED_FAMILIES):
                raise UnsupportedModelError(f"{type(module).__name__} cannot be masked: {why}")
        known: dict[str, list[str]] = {}
        for key in HOSTS:
            library, _, name = key.partition(".")
            known.setdefault(library, []).append(name.removesuffix("Embeddings").removesuffix("Vision"))
        raise UnsupportedModelError(
            f"{type(model).__name__} holds no vision transformer that gaussmask knows; it knows "
            + "; ".join(f"{library}: {', '.join(names)}" for library, names in known.items())
            + ". In a model of your own, call the drop on the tokens: x = drop(x)"
        )
    for owner in places[0].owners:
        config = getattr(owner, "config", None)
        image_tokens = any(getattr(config, name, None) is not None for name in ("image_token_id", "image_token_index"))
        if why := IMAGE_TOKENS if image_tokens else _reason(owner, REFUSED_OWNERS):
            raise UnsupportedModelError(f"{type(owner).__name__} cannot be masked: {why}")
    return places[0]
