"""What a collection is made of: its tables, its features, and options by feature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _errors
from ._batches import named
from .base import Table
from .float_table import FloatTable

if TYPE_CHECKING:
    from collections.abc import Callable

    from .table import QuantizedTable


def tables_of(value: Any) -> dict[str, QuantizedTable | FloatTable]:
    if isinstance(value, Mapping):
        given = dict(value)
    elif isinstance(value, (list, tuple)):
        given = {str(number): table for number, table in enumerate(value)}
    else:
        raise TypeError(f"tables must be a dict or a list of tables, got {_errors.kind_of(value)}")
    tables: dict[str, Any] = {}
    for name, table in given.items():
        if not isinstance(name, str):
            raise TypeError(f"tables must have strings as names, got {_errors.kind_of(name)}")
        if isinstance(table, Table):
            tables[name] = table
        elif isinstance(table, np.ndarray) or hasattr(table, "__dlpack__"):
            tables[name] = named(f"tables[{name!r}]", FloatTable, table)
        else:
            raise TypeError(f"tables[{name!r}] must be a table or an array of floats, got {_errors.kind_of(table)}")
    if not tables:
        raise ValueError("tables must hold a table, got none")
    return tables


def features_of(value: Any, tables: Mapping[str, Any]) -> dict[str, str]:
    if value is None:
        return {name: name for name in tables}
    if not isinstance(value, Mapping):
        raise TypeError(f"features must be a dict of feature to table, got {_errors.kind_of(value)}")
    features: dict[str, str] = {}
    for feature, name in dict(value).items():
        if not isinstance(feature, str):
            raise TypeError(f"features must have strings as names, got {_errors.kind_of(feature)}")
        if not isinstance(name, str) or name not in tables:
            raise ValueError(f"features[{feature!r}] must be the name of a table, got {_errors.shown(name)}")
        features[feature] = name
    if not features:
        raise ValueError("features must hold a feature, got none")
    return features


class ByFeature(dict[str, Any]):
    """An option for each feature, and whether the caller gave them one by one."""

    is_each = False


def by_feature(value: Any, name: str, features: Mapping[str, str], default: Any) -> ByFeature:
    """One value for all, or a dict; where it has none, the default."""
    if not isinstance(value, Mapping):
        return ByFeature(dict.fromkeys(features, value))
    given = dict(value)
    for feature in given:
        if feature not in features:
            raise ValueError(f"{name} must name features of the collection, got {_errors.shown(feature)}")
    options = ByFeature({feature: given.get(feature, default) for feature in features})
    options.is_each = True
    return options


def checked(check: Callable[..., Any], name: str, options: ByFeature, feature: str, *arguments: Any) -> Any:
    if not options.is_each:
        return check(options[feature], *arguments)
    return named(f"{name}[{feature!r}]", check, options[feature], *arguments)
