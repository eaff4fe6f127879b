"""The one vision tower of a model that takes a drop, or the reason why there is none.

Nothing here imports timm, transformers or open_clip: classes are recognised by name along the MRO, so that subclasses
and classes made on the fly (FSDP2) count.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..seams.host import Host, Place
from ..seams.unsupported import UnsupportedModelError
from . import open_clip, timm, transformers
from .refusals import reason_against, reason_against_owner

# By `library.Class`.
HOSTS: dict[str, Host] = {
    f"{library}.{name}": host
    for library, rows in (
        ("timm", timm.HOSTS),
        ("open_clip", open_clip.HOSTS),
        ("transformers", transformers.HOSTS),
    )
    for name, host in rows.items()
}


def names(module: nn.Module) -> list[str]:
    """`library.Class` for the class of `module` and its bases."""
    return [f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(module).__mro__]


def _places(module: nn.Module, owners: tuple[nn.Module, ...] = (), path: str = "") -> Iterator[Place]:
    """The hosts in `module`, outermost only."""
    key = next((name for name in names(module) if name in HOSTS), None)
    if key is not None and not isinstance(module, torch.jit.ScriptModule):
        yield Place(HOSTS[key], key, module, owners, path)
        return
    for name, child in _children_in_use(module):
        yield from _places(child, (*owners, module), f"{path}.{name}" if path else name)


def _children_in_use(module: Any) -> list[tuple[str, nn.Module]]:
    """The submodules with their names; of a module that PEFT trains whole the copy in use, not the frozen original."""
    if type(module).__name__ != "ModulesToSaveWrapper":
        return list(module.named_children())
    adapters = [module.active_adapter] if isinstance(module.active_adapter, str) else module.active_adapter
    copies = [f"modules_to_save.{adapter}" for adapter in adapters if adapter in module.modules_to_save]
    return [(name, module.get_submodule(name)) for name in copies or ["original_module"]]


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
            if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
                raise UnsupportedModelError(
                    f"{type(module).__name__} is a scripted, traced or exported model, which no drop can be put into: "
                    "attach to the model that it was made of"
                )
            if why := reason_against(names(module)):
                raise UnsupportedModelError(f"{type(module).__name__} cannot be masked: {why}")
        raise UnsupportedModelError(
            f"{names(model)[0]} holds no vision transformer that gaussmask knows (the documentation lists them under "
            "Hosts). In a model of your own, call the drop on the tokens, behind their position embedding: "
            "x = drop(x), with num_prefix_tokens=1 if a class token stands in front"
        )
    (place,) = places
    for owner in place.owners:
        if why := reason_against_owner(names(owner), owner):
            raise UnsupportedModelError(f"{type(owner).__name__} cannot be masked: {why}")
    if why := place.host.refuse(place.module):
        raise UnsupportedModelError(f"{place.name} cannot be masked: {why}")
    return place
