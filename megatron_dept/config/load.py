"""From a YAML file and dotted flags to a `RunConfig`.

A file may name a `base:` file (relative to itself) that it is merged over, and `model.preset` a set of model fields
that the file's own override. A flag names a field by its dotted path: `--optimizer.learning_rate 3e-4`. Values of flags
are read as YAML. Every mistake is a `ConfigError` on one line that names the field and the remedy.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from megatron_dept.common.errors import ConfigError
from megatron_dept.config.presets import PRESETS
from megatron_dept.config.schema import ModelConfig, RunConfig


class _Loader(yaml.SafeLoader):
    """YAML that reads `3e-4` as the number it is (YAML 1.1: as text), and refuses a field that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"field {name} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read `path`, merge its bases, apply dotted flags (`["--dept.rounds", "3"]`), and validate.

    Raises `ConfigError` naming the file or flag, the field, the value and the remedy.
    """
    values = _read(Path(path), ())
    for field, value in _flags(overrides):
        _assign(values, field, value)
    model = values.get("model")
    if isinstance(model, dict) and "preset" in model:
        preset = model.pop("preset")
        if not isinstance(preset, str) or preset not in PRESETS:
            raise ConfigError(f"{path}: model.preset {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
        values["model"] = {**PRESETS[preset], **model}
    return validate_config(values, str(path))


def validate_config(values: dict[str, Any], origin: str) -> RunConfig:
    """Validate plain values as a `RunConfig`; `origin` (a file name) stands first in the `ConfigError`."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        items = error.errors()
        told = [_explain(item) for item in items if not _follows(item, items)]
        raise ConfigError(f"{origin}: {'; '.join(told)}") from error


def dump_config(config: RunConfig) -> str:
    """The configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """One line a field, for `--help`: dotted flag, type, default, meaning; `sources[].data`, of a list, is no flag."""
    if section is ModelConfig:
        yield f"  --{prefix}preset  one of {', '.join(PRESETS)}: sizes that the section's own fields override"
    for name, field in section.model_fields.items():
        inner = next((t for t in (field.annotation, *get_args(field.annotation)) if _is_section(t)), None)
        if inner is not None:
            many = get_origin(field.annotation) is tuple
            yield from describe_fields(inner, f"{prefix}{name}[]." if many else f"{prefix}{name}.")
            continue
        kind = getattr(field.annotation, "__name__", None)
        if kind is None or get_args(field.annotation):
            kind = str(field.annotation).replace("typing.", "").replace("pathlib.", "")
        default = "required" if field.is_required() else f"default {field.default!r}"
        dashes = "" if "[]" in prefix else "--"
        yield f"  {dashes}{prefix}{name}  {kind}, {default}" + (f": {field.description}" if field.description else "")


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: base files name one another in a circle; remove one 'base:'")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; give the path of a run's YAML file") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give the path of a run's YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of fields, not {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(f"{path}: base {base!r} is not the path of a file; name a YAML file relative to this one")
    return _merge(_read(path.parent / base, (*seen, path.resolve())), values)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = _merge(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged


def _flags(overrides: Sequence[str]) -> Iterator[tuple[str, Any]]:
    rest = list(overrides)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"argument {flag!r} is not a field; write --section.field value")
        name, equals, text = flag[2:].partition("=")
        if not equals:
            if not rest:
                raise ConfigError(f"flag --{name} has no value; write --{name} VALUE")
            text = rest.pop(0)
        try:
            yield name, yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise ConfigError(f"flag --{name}: {text!r} is not a YAML value") from error


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, field = dotted.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"flag --{dotted}: {section} is not a section; set it in the file")
        values = inner
    values[field] = value


def _follows(item: Any, items: Sequence[Any]) -> bool:
    """Whether an error is but the echo of another: a list whose only entry is wrong is also reported as too short."""
    inside = (other["loc"][: len(item["loc"])] == item["loc"] for other in items if other is not item)
    return item["type"] == "too_short" and any(inside)


def _explain(item: Any) -> str:
    """One pydantic error in one clause, with the nearest known field where the name is unknown."""
    where = ".".join(str(part) for part in item["loc"]) or "configuration"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        section: Any = RunConfig
        for part in item["loc"][:-1]:
            annotation = section.model_fields[part].annotation if part in section.model_fields else section
            section = next((t for t in _nested(annotation) if _is_section(t)), section)
        near = difflib.get_close_matches(str(item["loc"][-1]), section.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; known fields: {', '.join(section.model_fields)}"
        return f"unknown field {where} (value {item['input']!r}){hint}"
    if item["type"] == "missing":
        return f"field {where} is missing; give it a value"
    if item["type"] == "value_error":
        return f"{where}: {message}" if item["loc"] else message
    return f"{where}: {message} (value {item['input']!r})"


def _nested(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _nested(inner)
