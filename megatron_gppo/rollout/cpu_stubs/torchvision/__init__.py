"""Import-only stand-in for torchvision: SGLang and Transformers import it at module level for image models, and the
published wheel breaks beside a CPU build of torch.

Any name can be imported and read (enum members of interpolation modes are read at import time); calling one raises.
"""

import sys
import types
from typing import NoReturn

__version__ = "0.0.0"


class _Missing(type):
    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"

    def __call__(cls, *args: object, **kwargs: object) -> NoReturn:
        raise NotImplementedError(f"torchvision's {cls.__name__} is not available: this is the import-only stand-in")


class _MissingModule(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # makes it a package, so that its submodules can be imported

    def __getattr__(self, name: str) -> _Missing:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Missing(name, (), {})


for _name in ("transforms", "transforms.functional", "transforms.v2", "transforms.v2.functional", "io", "ops"):
    _module = _MissingModule(f"{__name__}.{_name}")
    sys.modules[_module.__name__] = _module
    _parent, _, _leaf = _module.__name__.rpartition(".")
    setattr(sys.modules[_parent], _leaf, _module)
