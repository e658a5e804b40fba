"""Frozen config dataclasses from TOML recipes and command lines, and checks of their values.

Precedence: default < recipe < command line. Every script calls `parse` with its own config class. The class declares
each option once; the docstring under a field is its text in `--help`.
"""

from __future__ import annotations

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from larp.files import user_path, user_text

Config = TypeVar("Config")

DATA_SPECS = (
    "ucf101:ROOT, k600:ROOT, csv:FILE, jsonl:FILE, folder:DIR, wds:PATTERN, hf-disk:FOLDER, shapes:, joined with +"
)
"""The kinds of data specs, for `--help`; see larp/data/datasets.py."""

_INHERIT = "inherit"


class ConfigError(ValueError):
    """An invalid recipe, saved config or command line; the message names the place and the remedy."""


# ---------------------------------------------------------------------------------------------------- dict -> dataclass


def from_dict(cls: type[Config], values: dict[str, Any], where: str) -> Config:
    """Build the (nested, frozen) dataclass `cls` from plain values; fields missing from `values` keep their defaults.

    Hyphens in keys count as underscores. Lists become tuples and text becomes Path where the field's type says so.
    "None" means None in optional fields.

    `where` (a file or option name) starts every message. Raises ConfigError for an unknown key (naming the nearest
    known one), a value of the wrong type, a missing required key, and a ValueError of a `__post_init__`.
    """
    return _build(cls, _convert_group(cls, values, where, prefix=""), dataclasses.MISSING, where, prefix="")


def check_types(config: Any) -> None:
    """Raise ConfigError unless every field has its declared type, by the rules of `from_dict`.

    Call this first in a `__post_init__`. Nested configs check themselves.
    """
    where = type(config).__name__
    for key, annotation in _field_types(type(config)).items():
        value, group = getattr(config, key), _group_class(annotation)
        if group is None or value is None:
            _convert(value, annotation, where, key)
        elif not isinstance(value, group):
            raise _wrong_type(where, key, value, f"a {group.__name__}")


def check_positive(config: Any, *names: str, where: str = "") -> None:
    """Raise ValueError, starting with `where`, unless the named fields are at least 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{where}{name} must be at least 1, got {getattr(config, name)}")


def to_dict(config: Any) -> Any:
    """Convert a config to plain dicts, lists, text, numbers, booleans and None; the inverse of `from_dict`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}
    if isinstance(config, dict):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return str(config) if isinstance(config, Path) else config


def is_whole(value: object) -> bool:
    """Return whether `value` is an integer of Python or numpy. bool does not count: as a number it is a mistake."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether `value` is a real number of Python or numpy, NaN and infinity included; bool does not count."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError, naming the option, unless `value` is an integer of at least `least`."""
    if not is_whole(value) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def _convert_group(cls: type, values: Any, where: str, prefix: str) -> dict[str, Any]:
    """Check and convert the given keys of one (nested) dataclass. Missing keys stay missing."""
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where}: '{prefix.rstrip('.')}' is a group of options ({', '.join(_field_types(cls))}), not the "
            f"value {values!r}"
        )
    field_types = _field_types(cls)
    converted = {}
    for raw_key, value in values.items():
        key = raw_key.replace("-", "_")
        if key not in field_types:
            raise ConfigError(f"{where}: unknown key '{prefix}{raw_key}'{_nearest_key(cls, key, prefix)}")
        converted[key] = _convert(value, field_types[key], where, prefix + key)
    return converted


def _convert(value: Any, annotation: Any, where: str, key: str) -> Any:
    """Convert one value to its annotation. A nested group stays a dict, which can still be merged."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where, key)
    if dataclasses.is_dataclass(annotation):
        return _convert_group(annotation, value, where, key + ".")
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return value
        raise _wrong_type(where, key, value, "one of " + ", ".join(repr(choice) for choice in arguments))
    if origin is tuple or annotation is tuple:
        return _convert_tuple(value, arguments, where, key)
    if origin is list:
        return [
            _convert(item, arguments[0], where, f"{key}[{i}]") for i, item in enumerate(_as_list(value, where, key))
        ]
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong_type(where, key, value, "a table")
        return {name: _convert(item, arguments[1], where, f"{key}.{name}") for name, item in value.items()}
    return _convert_scalar(value, annotation, where, key)


def _in_home(value: Any) -> Any:
    """Return paths, text and what configs and tuples hold of them with a leading ~ as the home folder; see `user_path`."""
    if isinstance(value, Path):
        return user_path(value)
    if isinstance(value, str):
        return user_text(value) if value.startswith("~/") else value
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(_in_home(item) for item in value)
    if dataclasses.is_dataclass(value):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        new = {name: _in_home(item) for name, item in old.items()}
        return dataclasses.replace(value, **new) if new != old else value
    return value


def _convert_scalar(value: Any, annotation: Any, where: str, key: str) -> Any:
    if annotation is Path and isinstance(value, (str, Path)):
        return user_path(value)
    if annotation is str and isinstance(value, str):
        return _in_home(value)
    if annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    # bool is a subclass of int: without this check `steps = true` would train for one step.
    if isinstance(value, annotation) and (annotation is bool or not isinstance(value, bool)):
        return value
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text in quotes",
        Path: "a path in quotes",
    }
    raise _wrong_type(where, key, value, names.get(annotation, getattr(annotation, "__name__", str(annotation))))


def _convert_union(value: Any, choices: Sequence[Any], where: str, key: str) -> Any:
    # TOML has no null: the command line's word for it serves here, too.
    if type(None) in choices and (value is None or value == "None"):
        return None
    rest = [choice for choice in choices if choice is not type(None)]
    errors = []
    for choice in rest:
        try:
            return _convert(value, choice, where, key)
        except ConfigError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    raise _wrong_type(where, key, value, " or ".join(getattr(choice, "__name__", str(choice)) for choice in rest))


def _convert_tuple(value: Any, arguments: Sequence[Any], where: str, key: str) -> tuple:
    items = _as_list(value, where, key)
    if not arguments:
        return tuple(items)
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        arguments = (arguments[0],) * len(items)
    if len(items) != len(arguments):
        raise _wrong_type(where, key, value, f"a list of {len(arguments)} values")
    return tuple(
        _convert(item, kind, where, f"{key}[{i}]") for i, (item, kind) in enumerate(zip(items, arguments, strict=True))
    )


def _as_list(value: Any, where: str, key: str) -> Sequence[Any]:
    if isinstance(value, (list, tuple)):
        return value
    raise _wrong_type(where, key, value, "a list in [ ]")


def _wrong_type(where: str, key: str, value: Any, expected: str) -> ConfigError:
    return ConfigError(f"{where}: '{key}' is {value!r} ({type(value).__name__}), expected {expected}")


def _build(cls: type[Config], converted: dict[str, Any], base: Any, where: str, prefix: str) -> Config:
    """Construct `cls` from converted values on top of `base` (an instance, or MISSING/None for the defaults)."""
    field_types = _field_types(cls)
    arguments = {}
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        default = _default_of(field) if base in (dataclasses.MISSING, None) else getattr(base, field.name)
        if field.name in converted:
            group = _group_class(field_types[field.name])
            value = converted[field.name]
            nested = group is not None and isinstance(value, dict)
            arguments[field.name] = _build(group, value, default, where, f"{prefix}{field.name}.") if nested else value
        elif default is dataclasses.MISSING:
            raise ConfigError(f"{where}: '{prefix}{field.name}' is missing and has no default")
        else:
            arguments[field.name] = default
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{where}: {prefix.rstrip('.') + ': ' if prefix else ''}{error}") from error


def _default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _group_class(annotation: Any) -> type | None:
    """Return the dataclass in an annotation `Group` or `Group | None`; None if there is none."""
    return next((kind for kind in (annotation, *typing.get_args(annotation)) if dataclasses.is_dataclass(kind)), None)


def _all_keys(cls: type, prefix: str = "") -> Iterator[str]:
    for name, annotation in _field_types(cls).items():
        group = _group_class(annotation)
        yield prefix + name
        if group is not None:
            yield from _all_keys(group, f"{prefix}{name}.")


def _nearest_key(cls: type, key: str, prefix: str) -> str:
    """Return '; did you mean ...?' with the closest key of the group or its subgroups, else the list of known keys."""
    known = list(_all_keys(cls))
    by_leaf = {}
    for full in known:
        by_leaf.setdefault(full.rsplit(".", 1)[-1], full)
    close = difflib.get_close_matches(key, [*known, *by_leaf], n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{prefix}{by_leaf.get(close[0], close[0])}'?"
    return f"; known keys: {', '.join(prefix + name for name in _field_types(cls))}"


# -------------------------------------------------------------------------------------------------------------- recipes


def load_recipe(name_or_path: str | Path, folder: Path) -> dict[str, Any]:
    """Read a TOML recipe by its name in `folder` or by its path, on top of the recipe that its key `inherit` names.

    Groups are merged key by key; lists and values are replaced. Raises ConfigError for an unknown name (with the
    nearest one and the available recipes), for invalid TOML, and for recipes that inherit in a circle.
    """
    merged: dict[str, Any] = {}
    for _, values in _recipe_chain(name_or_path, folder):
        merged = _merge(merged, values)
    return merged


def _recipe_chain(name_or_path: str | Path, folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return (file, values) of the recipe and of all that it inherits from, the oldest ancestor first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    pending: str | Path | None = name_or_path
    asked_by = ""
    while pending is not None:
        path = _recipe_path(pending, folder, asked_by)
        if path in [seen for seen, _ in chain]:
            circle = " -> ".join(seen.name for seen, _ in [*chain, (path, {})])
            raise ConfigError(f"{path}: recipes inherit in a circle: {circle}; remove one 'inherit'")
        values = _read_toml(path)
        pending = values.pop(_INHERIT, None)
        if pending is not None and not isinstance(pending, str):
            raise _wrong_type(str(path), _INHERIT, pending, "the name of one recipe in quotes")
        chain.append((path, values))
        folder, asked_by = path.parent, f" (inherited by {path.name})"
    return chain[::-1]


def _recipe_path(name_or_path: str | Path, folder: Path, asked_by: str) -> Path:
    text = str(name_or_path)
    by_name = folder / (text if text.endswith(".toml") else f"{text}.toml")
    for candidate in (by_name, user_path(text)):
        if candidate.is_file():
            return candidate.resolve()
    available = sorted(path.stem for path in folder.glob("*.toml"))
    close = difflib.get_close_matches(text.removesuffix(".toml"), available, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    raise ConfigError(
        f"no recipe '{text}'{asked_by}: {hint}Recipes in {folder}: {', '.join(available) or 'none'}; or give the "
        "path of a .toml file"
    )


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


# --------------------------------------------------------------------------------------------------------- command line


def parse(
    cls: type[Config],
    argv: Sequence[str],
    recipes: Path,
    prog: str,
    default_recipe: str | None = None,
    adjust: Callable[[Config, dict[str, str]], Config] | None = None,
) -> tuple[Config, str | None]:
    """Parse a command line into (a `cls`, the recipe's name or None): default < recipe < command line.

    `--recipe NAME` names a recipe in the folder `recipes` or the path of one; the default is `default_recipe`.
    `--local_rank`, which the deepspeed launcher adds, is ignored. Options of groups are written
    `--model.num-tokens 16`; hyphens and underscores are equivalent.

    `adjust` is given the config of defaults and recipe, and the text of each typed option ({"model.num_tokens": "16"}).
    It returns the config from which the options that were not typed are taken.

    An invalid value on the command line ends the program with a message (exit code 2), `--help` with exit code 0.
    Raises ConfigError for an invalid recipe.
    """
    import tyro

    rest, recipe = _take_option(list(argv), ("--recipe",))
    rest, _ = _take_option(rest, ("--local_rank", "--local-rank"))
    recipe = recipe or default_recipe
    start = _start_config(cls, recipe, recipes)
    if adjust is not None:
        start = adjust(start, _typed(rest))
    available = ", ".join(sorted(path.stem for path in recipes.glob("*.toml"))) or "none"
    used = f" The values below are those of the recipe '{recipe}'." if recipe else ""
    summary = (
        f"{(cls.__doc__ or '').strip()}\n\n--recipe NAME starts from a recipe ({available}) or a .toml file.{used}"
    )
    if any(option.name == "data" for option in dataclasses.fields(cls)):
        summary += f"\n\nA data spec is {DATA_SPECS}; or the path of a folder or manifest."
    # The recipe decides whether an optional group exists; tyro would make subcommands of the choice.
    config = tyro.cli(
        cls, args=rest, default=start, prog=prog, description=summary, config=(tyro.conf.AvoidSubcommands,)
    )
    return _in_home(config), recipe


def _start_config(cls: type[Config], recipe: str | None, recipes: Path) -> Config:
    """Apply a recipe to the defaults. Each inherited file is checked alone, so that a message names the right one."""
    converted: dict[str, Any] = {}
    where = "defaults"
    for path, values in _recipe_chain(recipe, recipes) if recipe else []:
        where = str(path)
        converted = _merge(converted, _convert_group(cls, values, where, prefix=""))
    return _build(cls, converted, dataclasses.MISSING, where, prefix="")


def _typed(argv: Sequence[str]) -> dict[str, str]:
    """Return the text of each typed option by its name with underscores; "" if it has none. The last one wins."""
    typed = {}
    for item, following in zip(argv, [*argv, "--"][1:], strict=True):
        if item.startswith("--"):
            name, equals, attached = item.removeprefix("--").partition("=")
            typed[name.replace("-", "_")] = attached if equals else "" if following.startswith("--") else following
    return typed


def _take_option(argv: list[str], names: Sequence[str]) -> tuple[list[str], str | None]:
    """Remove `--name VALUE` and `--name=VALUE` from argv; return the rest and the last value."""
    rest, value = [], None
    items = iter(argv)
    for item in items:
        name, equals, attached = item.partition("=")
        if name not in names:
            rest.append(item)
        elif equals:
            value = attached
        else:
            value = next(items, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"{name} needs a value, for example: {name} NAME")
    return rest, value
