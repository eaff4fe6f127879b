"""What a seam leaves in the modules of a host, hooks and objects in the place of attributes, and how it goes again.

    seam, with the drop ---.
    hooks and stand-ins ---+--> link --> the seam, the host and its projection, and the forward that is running
    anchors in the host ---'

They lie in many modules, any of which may be copied or pickled by itself. So none of them holds the seam: they hold a
link, which is empty in a copy until the copies of the seam and of the host enter themselves again. A part that is
copied alone takes nothing of the rest with it, and what was left in it does nothing.
"""

import inspect
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn

from .call import Draw, Forward, is_in_method_of


class Was(NamedTuple):
    """What an object that stands in for an attribute found in its place."""

    kind: str  # "submodule", "attribute" or "absent"
    value: Any = None  # of an attribute; a seam keeps a submodule by itself


class Linked:
    """Lies in a module of a host, as a hook (then one of its methods is) or in the place of an attribute."""

    link: "Link"
    was: Was


class Helper(Linked):
    """Something small whose methods are hooks, and which never holds the seam or a module.

    Each hook has a function of its own, and does nothing where there is no seam. (One function that calls all of them
    would not do: of the hooks of the outermost module, torch.compile keeps what it finds by function.)
    """

    def __init__(self, link: "Link") -> None:
        self.link = link

    @property
    def seam(self) -> Any:
        return self.link.seam

    @property
    def now(self) -> Forward:
        return self.link.now

    @property
    def drop(self) -> Any:
        return self.link.drop

    @property
    def host_name(self) -> str:
        """The class that a user knows."""
        return str(self.link.seam.host_name)

    @property
    def active(self) -> bool:
        """Whether this forward drops patches."""
        drop = self.link.drop
        return drop is not None and drop.active

    def leave(self, module: nn.Module) -> None:
        """Leave a module as it was, if more than a hook was put into it."""

    @property
    def inside(self) -> bool:
        """Whether what is called is part of a forward of the tower, and not called by itself.

        A forward that goes round the hooks of the tower, as `model.forward(x)` or timm's `forward_features`, shows on
        the stack alone, where a graph that is being captured can't look.
        """
        link = self.link
        return link.now.running or torch.compiler.is_compiling() or is_in_method_of(link.tower, link.host)

    def current_draw(self) -> Draw:
        """The draw of the forward that is running; where nothing is dropped, one without indices."""
        seam = self.link.seam
        return Draw(0, 0) if seam is None else seam.current_draw()


class Anchor(Linked):
    """Lies in a module that the link has to find again in a copy."""

    def __init__(self, link: "Link", name: str, module: nn.Module) -> None:
        self.link = link
        self.name = name
        self.module = module
        setattr(link, name, module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        setattr(self.link, self.name, self.module)


class Link:
    """Ties them to their seam and to their host."""

    def __init__(self) -> None:
        self.seam: Any = None
        self.drop: Any = None  # of the seam, by a way that is shorter than that of a submodule
        self.host: Any = None
        self.tower: Any = None
        self.projection: Any = None
        self.now: Forward = Forward()
        self.touched: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # in a copy none, for it may be one of a part

    def __reduce__(self) -> tuple[type["Link"], tuple[()]]:
        return Link, ()

    def before(self, module: nn.Module, act: Any, *, first: bool = False) -> None:
        """Make a method of a helper a forward pre-hook, with keywords if it has a parameter `kwargs`; `first`, before
        those that are there."""
        takes_kwargs = "kwargs" in inspect.signature(act).parameters
        module.register_forward_pre_hook(act, with_kwargs=takes_kwargs)
        if first:
            # Not by torch's `prepend`, which leaves the dict below the OrderedDict in its old order: by their places
            # there torch.compile finds hooks again (2.11 does), and would ask one for what another one has.
            hooks = module._forward_pre_hooks
            for earlier in list(hooks)[:-1]:
                hooks[earlier] = hooks.pop(earlier)
        self.touched.add(module)

    def after(self, module: nn.Module, act: Any, *, always: bool = False) -> None:
        """Make a method of a helper a forward hook; `always`, with None for the output, also of one that breaks off."""
        takes_kwargs = "kwargs" in inspect.signature(act).parameters
        module.register_forward_hook(act, with_kwargs=takes_kwargs, always_call=always)
        self.touched.add(module)

    def put(self, owner: nn.Module, name: str, value: Linked) -> None:
        """Put something in the place of an attribute, or where there is none."""
        if name in owner._modules:
            value.was = Was("submodule")
        else:
            value.was = Was("attribute", vars(owner)[name]) if name in vars(owner) else Was("absent")
        setattr(owner, name, value)
        self.touched.add(owner)

    def anchor(self, name: str, module: nn.Module) -> None:
        """Find `module` again in copies, as the attribute `name`."""
        self.put(module, f"gaussmask_{name}", Anchor(self, name, module))

    def cut(self) -> None:
        """Part what lies in the host from the seam, and take it off."""
        self.seam = self.drop = self.host = self.tower = self.projection = None
        for module in self.touched:
            take_off(module)


def take_off(module: nn.Module) -> None:
    """Take out of a module what has no seam any more, and leave it as it was."""
    kinds: tuple[tuple[dict[int, Any], ...], ...] = (
        (module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
    )
    for hooks, *flags in kinds:
        for key, hook in list(hooks.items()):
            if is_cut(helper := _owner(hook)):
                for table in (hooks, *flags):
                    table.pop(key, None)
                helper.leave(module)
    for name, value in [*vars(module).items(), *module._modules.items()]:
        if is_cut(value):
            restore(module, name, value)


def _owner(hook: Any) -> Any:
    """The object that a hook is a method of."""
    return getattr(hook, "__self__", None)


def is_cut(value: object) -> bool:
    return isinstance(value, Linked) and value.link.seam is None


def restore(owner: nn.Module, name: str, value: Any) -> None:
    if value.was.kind == "submodule":
        setattr(owner, name, value.replaced)
        return
    delattr(owner, name)
    if value.was.kind == "attribute":
        setattr(owner, name, value.was.value)
