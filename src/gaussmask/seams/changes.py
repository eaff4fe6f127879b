"""What `attach` changes in a host, kept so that `detach` can put it back."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


class Changes:
    """Hooks that were registered and attributes that were set, in order."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.attributes: list[tuple[Any, str, str, Any]] = []  # owner, name, kind of what was there, and what it was

    def hook(self, *handles: RemovableHandle) -> None:
        """Remember hooks."""
        self.handles += handles

    def put(self, owner: nn.Module, name: str, value: Any) -> nn.Module | None:
        """Set an attribute of a module, and return the submodule that gave way, if it was one."""
        if name in owner._modules:
            kind, was = "submodule", owner._modules[name]
        else:
            kind, was = "attribute" if name in vars(owner) else "absent", vars(owner).get(name)
        self.attributes.append((owner, name, kind, was))
        setattr(owner, name, value)
        return was if kind == "submodule" else None

    def undo(self) -> None:
        """Leave everything as it was."""
        for handle in self.handles:
            handle.remove()
        for owner, name, kind, was in reversed(self.attributes):
            if kind == "submodule":
                setattr(owner, name, was)
                continue
            delattr(owner, name)
            if kind == "attribute":
                setattr(owner, name, was)
