"""A JSON object read field by field: every value checked, every field that nobody read reported.

Knows types and ranges, not what a field means.
"""

import math
from collections.abc import Mapping
from typing import Any

from mlx_edge.errors import ModelFormatError, UnsupportedModelError


class Fields:
    """Typed access to one JSON object; remembers which keys were read."""

    def __init__(self, raw: Mapping[str, Any], name: str) -> None:
        """`name` says in messages where the object stands, as in "config.json"."""
        self.raw = raw
        self.name = name
        self.unread = set(raw)

    def string(self, key: str, default: str | None = None) -> str:
        """A text value."""
        value = self._value(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def strings(self, key: str) -> list[str]:
        """A list of texts; empty when the key is absent."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self._wrong(key, value, "a list of strings")
        return value

    def integers(self, key: str, *, low: int = 0, high: int) -> list[int]:
        """A list of whole numbers from `low` to `high`; empty when the key is absent."""
        value = self._value(key, [])
        if not isinstance(value, list) or not all(
            isinstance(item, int) and low <= item <= high for item in value
        ):
            raise self._wrong(key, value, f"a list of whole numbers from {low} to {high}")
        return value

    def numbers(self, key: str, *, low: float) -> list[float]:
        """A list of finite numbers above `low`; empty when the key is absent."""
        value = self._value(key, [])
        if not isinstance(value, list):
            raise self._wrong(key, value, "a list of numbers")
        items = Fields({str(i): item for i, item in enumerate(value)}, f"{self.name}: {key}")
        return [items.number(str(i), low=low) for i in range(len(value))]

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """A truth value."""
        value = self._value(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int) -> int:
        """A whole number from `low` to `high`."""
        value = self._value(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._wrong(key, value, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float) -> float:
        """A finite number above `low`."""
        value = self._value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(key, value, "a number")
        try:
            result = float(value)
        except OverflowError:
            raise self._wrong(key, value, "a number that fits a float") from None
        if not math.isfinite(result) or result <= low:
            raise self._wrong(key, value, f"a finite number above {low:g}")
        return result

    def nested(self, key: str) -> "Fields | None":
        """An object inside this one, or None when it is absent, null or empty."""
        value = self._value(key, {})
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Fields(value, f"{self.name}: {key}") if value else None

    def refuse_unread(self) -> None:
        """Raise UnsupportedModelError naming the keys that nobody read; null and false switch nothing on."""
        left = sorted(
            str(key)
            for key in self.unread
            if self.raw[key] is not None and self.raw[key] is not False
        )
        if left:
            shown = ", ".join(f"{spell(key)} = {_brief(self.raw[key])}" for key in left)
            raise UnsupportedModelError(
                f"{self.name}: not supported: {shown}; it may change what the model computes. "
                "If it does not, remove it from the file"
            )

    def _value(self, key: str, default: Any) -> Any:
        self.unread.discard(key)
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is None:
            raise ModelFormatError(f"{self.name}: {key} is missing")
        return default

    def _wrong(self, key: str, value: Any, expected: str) -> ModelFormatError:
        return ModelFormatError(f"{self.name}: {key} is {_brief(value)}, expected {expected}")


def spell(key: str) -> str:
    """A word of a stranger's file, in one line."""
    return key if key.isprintable() and len(key) <= 60 else _brief(key)


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = "a huge number"
    return text if len(text) <= 60 else f"{text[:57]}..."
