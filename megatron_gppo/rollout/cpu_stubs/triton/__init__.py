"""Import-only stand-in for Triton on a machine without a GPU.

Every submodule and name exists; decorators return the function they are given; a kernel cannot be launched, because a
plain Python function has no `kernel[grid]`.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any

__version__ = "3.0.0"


class _AnyType(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class _AnyModule(types.ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []  # makes it a package, so that its submodules can be imported

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        full_name = f"{self.__name__}.{name}"
        value: Any
        if name[0].isupper():
            is_exception = name.endswith(("Error", "Resources"))
            value = _AnyType(
                name, (Exception,) if is_exception else (), {"__init__": lambda self, *args, **kwargs: None}
            )
        else:
            value = sys.modules.setdefault(full_name, _AnyModule(full_name))
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As a decorator, bare (@triton.jit) or with arguments (@triton.jit(...))."""
        if len(args) == 1 and callable(args[0]) and not kwargs:
            return args[0]
        return lambda function: function


class _AnyFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith(f"{__name__}."):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _AnyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


class Config:
    """triton.Config of an autotuner: only its arguments are read."""

    def __init__(
        self, kwargs: dict[str, Any] | None = None, num_warps: int = 4, num_stages: int = 2, **other: Any
    ) -> None:
        self.kwargs = kwargs or {}
        self.num_warps = num_warps
        self.num_stages = num_stages


class _Constexpr:
    def __init__(self, value: Any = None) -> None:
        self.value = value


def cdiv(dividend: int, divisor: int) -> int:
    return -(-dividend // divisor)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


sys.meta_path.insert(0, _AnyFinder())
sys.modules[__name__].__class__ = _AnyModule
for _name in (
    "language",
    "compiler.compiler",
    "runtime.jit",
    "runtime.cache",
    "runtime.autotuner",
    "backends.compiler",
):
    importlib.import_module(f"{__name__}.{_name}")
# torch's compiler asks for these by value at import time.
sys.modules[f"{__name__}.language"].constexpr = _Constexpr  # type: ignore[attr-defined]
for _name in ("compiler.compiler", "runtime.cache"):
    sys.modules[f"{__name__}.{_name}"].triton_key = lambda: "import-only stand-in"  # type: ignore[attr-defined]
