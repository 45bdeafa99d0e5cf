"""torch, torchvision, numpy and scipy's solver, each imported when one of its names is first used.

Recipes, configs and objectives are described, made and read from files without them, so that `--help` and mistakes in a command come
at once: importing torch takes seconds. The modules that such a command imports take these names from here; all others, such as those
that define layers, say `import torch` as usual. A decorator or a default value would use a name at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

__all__ = ["F", "nn", "np", "optimize", "torch", "tv_tensors", "v2"]


class _AtUse(ModuleType):
    """Stands for a module. Threads that meet here wait for each other in Python's own lock of imports."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self.__name__), name)


if TYPE_CHECKING:
    import numpy as np
    import torch
    import torch.nn.functional as F
    from scipy import optimize
    from torch import nn
    from torchvision import tv_tensors
    from torchvision.transforms import v2
else:
    np, torch, nn, F = _AtUse("numpy"), _AtUse("torch"), _AtUse("torch.nn"), _AtUse("torch.nn.functional")
    optimize, tv_tensors, v2 = _AtUse("scipy.optimize"), _AtUse("torchvision.tv_tensors"), _AtUse("torchvision.transforms.v2")


def public_names(package: str, **homes: tuple[str, ...]) -> Callable[[str], Any]:
    """`__getattr__` of a package, some of whose public names are imported when they are first used.

    Args:
        homes: those names, by the module below the package that has them.
    """
    home = {name: f"{package}.{module}" for module, names in homes.items() for name in names}

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home[name]), name)

    return find
