"""What `attach` changes in a host, kept so that `detach` can put it back."""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

OURS = __name__.partition(".")[0]


def is_ours(hook: Any) -> bool:
    """Whether a hook is a method of something of this library, or an object of it."""
    return type(getattr(hook, "__self__", hook)).__module__.startswith(f"{OURS}.")


def remove_hooks(module: nn.Module) -> None:
    """Take this library's hooks off a module, whichever seam they are of.

    A copy of a part has hooks of a seam that no model knows, as where PEFT copies the embeddings of an attached model.
    """
    kinds: tuple[tuple[dict[int, Any], ...], ...] = (
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    )
    for hooks, *flags in kinds:
        for key in [key for key, hook in hooks.items() if is_ours(hook)]:
            for table in (hooks, *flags):
                table.pop(key, None)


class Changes:
    """Hooks that were registered and attributes that were set, in order."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.attributes: list[tuple[Any, str, str, Any]] = []  # owner, name, kind of what was there, and what it was

    def __getstate__(self) -> dict[str, Any]:
        # In a copy of a part, the hooks of what lies around it are dead, and torch copies no handle of a dead hook.
        alive = [
            handle
            for handle in self.handles
            if handle.hooks_dict_ref() is not None and None not in [ref() for ref in handle.extra_dict_ref]
        ]
        return {**self.__dict__, "handles": alive}

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
