"""`NamedTuple`, as typing has it, but for the import of typing: that alone would double what `import lingerx` costs.

For type checkers it is typing's own, see `_status.py`. Nothing else may live here.
"""

from __future__ import annotations

from collections import namedtuple


class _Fields(type):
    """Makes a named tuple of a class body: its annotations are the fields."""

    def __new__(cls, name: str, bases: tuple[type, ...], body: dict[str, object]) -> type:
        if not bases:
            return super().__new__(cls, name, bases, body)
        annotations = body["__annotations__"]
        assert isinstance(annotations, dict)
        made = namedtuple(name, annotations, module=str(body["__module__"]))  # type: ignore[misc]
        made.__doc__ = str(body["__doc__"])
        made.__annotations__ = annotations
        return made


class NamedTuple(metaclass=_Fields):
    """The base of records: `class Place(NamedTuple): x: int`."""
