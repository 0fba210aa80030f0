"""JSON schemas as TGI reads them: an object has the properties that are named, and no others."""

from __future__ import annotations

from typing import Any, Final

#: These hold schemas by name.
_BY_NAME: Final = ("properties", "$defs", "definitions")
#: These hold lists of schemas.
_LISTS: Final = ("anyOf", "oneOf", "prefixItems")
#: An object with one of these may have properties that it does not name.
_OPENING: Final = frozenset(
    {"$ref", "anyOf", "oneOf", "not", "if", "dependentSchemas", "patternProperties", "unevaluatedProperties"}
    | {"minProperties", "propertyNames", "additionalProperties"}
)


def closed(schema: Any) -> Any:
    """The schema, with properties that it does not name forbidden where it says nothing of them.

    What matches the result matches the schema. One that merges schemas is left as it is: what one of them names is
    foreign to the others.
    """
    return schema if _merges(schema) else _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, dict):
        return schema
    schema = dict(schema)
    for key in _BY_NAME:
        if isinstance(schema.get(key), dict):
            schema[key] = {name: _closed(value) for name, value in schema[key].items()}
    for key in _LISTS:
        if isinstance(schema.get(key), list):
            schema[key] = [_closed(value) for value in schema[key]]
    if "items" in schema:
        schema["items"] = _closed(schema["items"])
    if "properties" in schema:
        schema.setdefault("type", "object")
        if not _OPENING & schema.keys() and set(schema.get("required", ())) <= schema["properties"].keys():
            schema["additionalProperties"] = False
    return schema


def _merges(schema: Any) -> bool:
    """Whether an object in it is described by several schemas together."""
    if isinstance(schema, list):
        return any(_merges(value) for value in schema)
    if not isinstance(schema, dict):
        return False
    if "allOf" in schema or ("properties" in schema and {"$ref", "anyOf", "oneOf"} & schema.keys()):
        return True
    return any(_merges(value) for value in schema.values())
