"""The rule for fields: implemented, refused by name, or ignored and listed in a header; never silent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast

from pymllm_server.errors import ApiError

IGNORED_HEADER = "x-pymllm-ignored-fields"

T = TypeVar("T")


class _FailFast(FailFast):
    """pydantic's marker, which lacks the hash that a union of annotated types needs before Python 3.12."""

    def __hash__(self) -> int:
        return hash(self.fail_fast)


# A list of a million wrong items shall make one complaint, not a million.
ListOf = Annotated[list[T], _FailFast()]


@dataclass(frozen=True, slots=True)
class Refused:
    """A field that is known, but not offered. neutral: values that ask for nothing, and so may be sent."""

    reason: str
    neutral: tuple[Any, ...] = ()


class Wire(BaseModel):
    """An object that clients send. Types are not coerced: ``"8"`` is no number."""

    model_config = ConfigDict(
        extra="allow", strict=True, allow_inf_nan=False, frozen=True, protected_namespaces=()
    )
    IGNORED: ClassVar[frozenset[str]] = frozenset()
    REFUSED: ClassVar[Mapping[str, Refused]] = {}

    def ignored_fields(self, prefix: str = "") -> list[str]:
        """The fields sent that change nothing. Raises ApiError (400) for those refused or unknown."""
        ignored = []
        for name, value in (self.model_extra or {}).items():
            path = prefix + name
            if name in self.REFUSED:
                refused = self.REFUSED[name]
                if value is not None and value not in refused.neutral:
                    message = f"{path} is not supported: {refused.reason}"
                    raise ApiError(400, message, param=path, code="unsupported_parameter")
            elif name not in self.IGNORED:
                shown = path if len(path) <= 100 else f"{path[:100]}..."
                raise ApiError(400, f"unknown field {shown!r}", param=shown, code="unknown_parameter")
            elif value is not None:
                ignored.append(path)
        for path, child in self._children(prefix):
            ignored += child.ignored_fields(path)
        return ignored

    def _children(self, prefix: str) -> Iterator[tuple[str, Wire]]:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Wire):
                yield f"{prefix}{name}.", value
            elif isinstance(value, list) and value and isinstance(value[0], Wire):
                for index, item in enumerate(value):
                    yield f"{prefix}{name}.{index}.", item


def ignored_header(ignored: list[str]) -> dict[str, str]:
    """The response header that lists ignored fields; bounded, as is each proxy's patience with headers."""
    return {IGNORED_HEADER: ", ".join(ignored)[:1000]} if ignored else {}
