"""Typed reading of a config.json: a field that cannot be honoured refuses the model, or the adapter, by its name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

#: Fields that change any model in ways that no model here knows, and what they are.
_REFUSED_FIELDS: Final = {
    "quantization_config": "quantised weights are not supported",
    "compression_config": "quantised weights are not supported",
    "per_layer_config": "fields that differ from layer to layer are not supported",
}


class UnsupportedModelError(Exception):
    """The model, or an adapter, cannot be served as it was made. The text names the field of its configuration."""


class ConfigFields:
    """The fields of a config.json, or of an object inside one.

    Readers take a default for fields that may be absent; without one, an absent field is refused, as is a `null`
    and a value of another type. All raise `UnsupportedModelError`.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "", file: str = "config.json") -> None:
        """`file`: as messages call it."""
        self._values = values
        self._prefix = prefix
        self._file = file

    @classmethod
    def load(cls, folder: Path) -> ConfigFields:
        """Read the config.json of a model's folder."""
        fields = cls.read(folder / "config.json", "config.json")
        for name, reason in _REFUSED_FIELDS.items():
            if not fields.is_null(name):
                raise fields.refusal(name, reason)
        return fields

    @classmethod
    def read(cls, path: Path, file: str) -> ConfigFields:
        """Read a file of any fields. `file`: as messages call it."""
        try:
            values = json.loads(path.read_bytes())
        except OSError:
            raise UnsupportedModelError(f"{file} is missing or cannot be read") from None
        except ValueError:
            raise UnsupportedModelError(f"{file} is not JSON") from None
        if not isinstance(values, dict):
            raise UnsupportedModelError(f"{file} is not a JSON object")
        return cls(values, file=file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def is_null(self, name: str) -> bool:
        """Whether the field is absent or null."""
        return self._values.get(name) is None

    def has(self, name: str) -> bool:
        """Whether the field is there, be it null."""
        return name in self._values

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        """An integer of at least `minimum`."""
        value: int = self._value(name, int, default)
        if value < minimum:
            raise self.refusal(name, f"must be at least {minimum}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive, finite number."""
        value = self._value(name, (int, float), default)
        if not 0.0 < value < float("inf"):
            raise self.refusal(name, "must be a positive number")
        return float(value)

    def boolean(self, name: str, default: bool | None = None) -> bool:
        """true or false."""
        value: bool = self._value(name, bool, default)
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        value: str = self._value(name, str, default)
        return value

    def items(self, name: str) -> list[Any]:
        """An array, unchecked."""
        value: list[Any] = self._value(name, list, None)
        return value

    def anything(self, name: str) -> Any:
        """Whatever it holds; `None` where it is absent."""
        return self._values.get(name)

    def object(self, name: str) -> ConfigFields:
        """An object's fields; none where it is absent or null."""
        return ConfigFields(self._value(name, dict, {}), f"{self._prefix}{name}.", self._file)

    def updated(self, values: Mapping[str, Any]) -> ConfigFields:
        """These fields with some replaced."""
        return ConfigFields({**self._values, **values}, self._prefix, self._file)

    def with_defaults(self, values: Mapping[str, Any]) -> ConfigFields:
        """These fields, those filled in that are absent or null."""
        return self.updated({name: value for name, value in values.items() if self.is_null(name)})

    def refusal(self, name: str, reason: str) -> UnsupportedModelError:
        """The error that refuses the model for this field's value."""
        return UnsupportedModelError(f"{self._file}: {self._prefix}{name} = {self._values.get(name)!r}: {reason}")

    def _value(self, name: str, types: type[Any] | tuple[type[Any], ...], default: Any) -> Any:
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise self.refusal(name, "the model needs this field")
            return default
        is_bool_by_mistake = isinstance(value, bool) and types is not bool
        if is_bool_by_mistake or not isinstance(value, types):
            raise self.refusal(name, "is of the wrong type")
        return value
