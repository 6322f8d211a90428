"""config.json of an HF folder, field by field, with errors that name it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megatron_gppo.convert.errors import ConvertError
from megatron_gppo.convert.json_text import parse_json

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HfConfig:
    path: Path
    fields: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "HfConfig":
        """Raises ConvertError where folder has no config.json, or it holds no JSON object."""
        path = folder / "config.json"
        fix = "Fix: give the folder of an HF model"
        try:
            fields = parse_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConvertError(f"{path}: {error.strerror}. {fix}") from error
        except ValueError as error:
            raise ConvertError(f"{path}: not valid JSON: {error}. {fix}") from error
        if not isinstance(fields, dict):
            raise ConvertError(f"{path}: holds a {type(fields).__name__}, not an object. {fix}")
        return cls(path, fields)

    def error(self, what: str, fix: str = "correct it as the model's files have it") -> ConvertError:
        return ConvertError(f"{self.path}: {what}. Fix: {fix}")

    def get(self, field: str, kind: type[T], default: T) -> T:
        """A field of one type; null and absent mean the default."""
        value = self.fields.get(field)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise self.error(f"{field} = {_shown(value)} is not a {kind.__name__}")
        return value

    def positive(self, field: str, value: object) -> float:
        try:
            number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        except OverflowError:
            number = math.inf
        if not 0 < number < math.inf:
            raise self.error(f"{field} = {_shown(value)} is not a positive number")
        return number

    def size(self, field: str, most: int = 2**31) -> int:
        """A positive integer that a model may have."""
        value = self.fields.get(field)
        if value is None:
            raise self.error(f"{field} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(f"{field} = {_shown(value)} is not a positive integer")
        if value > most:
            raise self.error(f"{field} = {_shown(value)} is more than the {most} that are supported")
        return value

    def refuse(self, field: str, supported: Any) -> None:
        """Raises if the field is there with anything but null or the value that is supported."""
        value = self.fields.get(field)
        if value is not None and value != supported:
            raise self.error(
                f"{field} = {_shown(value)} is not supported; only {supported!r} is", "convert a model with that"
            )

    def rope_theta(self) -> float:
        """transformers 5 keeps it in rope_parameters; before, it stood beside rope_scaling, which still goes first."""
        thetas = {"rope_theta": self.fields.get("rope_theta")}
        for field in ("rope_scaling", "rope_parameters"):
            scaling = self.get(field, dict, {})
            for rope_type in (scaling.get("rope_type"), scaling.get("type")):
                if rope_type not in (None, "default"):
                    raise self.error(
                        f"{field} has rope type {_shown(rope_type)} (scaled rotary positions), which is not supported",
                        "remove it if sequences stay within the original context",
                    )
            if scaling.get("partial_rotary_factor", 1.0) != 1.0:
                raise self.error(f"{field} has a partial_rotary_factor, which is not supported; only 1.0 is")
            thetas[f"{field}.rope_theta"] = scaling.get("rope_theta")
        given = {field: self.positive(field, value) for field, value in thetas.items() if value is not None}
        if len(set(given.values())) > 1:
            differing = ", ".join(f"{field} = {value}" for field, value in given.items())
            raise self.error(f"{differing} contradict each other", "keep the one that the model was trained with")
        return next(iter(given.values()), 10000.0)


def _shown(value: object) -> str:
    """A value in an error of one line: damaged numbers have hundreds of digits."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
