"""The JSON of a request, taken apart field by field: each is checked, and none is left over."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

from triton_repo.openai.errors import ApiError, refuse

T = TypeVar("T")
INT32 = 2**31 - 1


def parse(body: bytes) -> Fields:
    """The fields of a JSON object. Raises ApiError for anything else, and for NaN, which is no JSON."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8; encode it as UTF-8", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body is no JSON object; send {...}", code="invalid_json")
    return Fields(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


class Fields:
    """What is left of a request; null is as if the field were not there.

    A taker raises ApiError where the value is not of its kind. `none_left` refuses what nobody took.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, check: Callable[[str, Any], T], default: T) -> T:
        return check(name, self._left.pop(name)) if name in self._left else default

    def require(self, name: str, check: Callable[[str, Any], T]) -> T:
        if name not in self._left:
            raise refuse(name, "missing; it must be given", "missing_required_parameter")
        return check(name, self._left.pop(name))

    def only(self, name: str, *neutral: Any, why: str) -> None:
        """A field whose other values ask for what is not there."""
        value = self._left.pop(name, neutral[0])
        if not any(type(value) is type(known) and value == known for known in neutral):
            raise refuse(name, f"{why}; leave it out", "unsupported_parameter")

    def ignore(self, *names: str) -> None:
        for name in names:
            self._left.pop(name, None)

    def none_left(self) -> None:
        for name in self._left:
            raise refuse(shown(name), "unknown or not supported here; leave it out", "unknown_parameter")


def shown(name: str) -> str:
    """A text of the client's own choice, short and encodable."""
    return name[:60].encode("utf-8", "replace").decode()


def boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise refuse(name, "no boolean; give true or false", "invalid_type")
    return value


def integer(low: int, high: int = INT32) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if type(value) is not int:
            raise refuse(name, "no integer; give one", "invalid_type")
        if not low <= value <= high:
            raise refuse(name, f"{shown(str(value))} is not between {low} and {high}", "invalid_value")
        return value

    return check


def number(low: float, high: float, *, above: bool = False) -> Callable[[str, Any], float]:
    """Between `low` and `high`; `above`: not `low` itself."""

    def check(name: str, value: Any) -> float:
        if type(value) not in (int, float):
            raise refuse(name, "no number; give one", "invalid_type")
        if not low <= value <= high or (above and value == low) or not math.isfinite(value):
            least = f"above {low:g} and at most" if above else f"between {low:g} and"
            raise refuse(name, f"{shown(str(value))} is not {least} {high:g}", "invalid_value")
        return float(value)

    return check


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise refuse(name, "no string; give one", "invalid_type")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refuse(name, "holds half a surrogate pair, which is no text", "invalid_value") from None
    return value


def texts(most: int) -> Callable[[str, Any], tuple[str, ...]]:
    """One string or a list of up to `most`, none of them empty."""

    def check(name: str, value: Any) -> tuple[str, ...]:
        values = value if isinstance(value, list) else [value]
        if len(values) > most:
            raise refuse(name, f"{len(values)} strings; give at most {most}", "invalid_value")
        found = tuple(text(name, one) for one in values)
        if "" in found:
            raise refuse(name, "an empty string; leave it out", "invalid_value")
        return found

    return check


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise refuse(name, "no list of token ids; give one", "invalid_type")
    return tuple(integer(0)(name, one) for one in value)


def mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise refuse(name, "no object; give {...}", "invalid_type")
    return value
