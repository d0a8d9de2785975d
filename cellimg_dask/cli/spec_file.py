"""Reading a spec from its file, telling what is wrong with it, and writing it down in full."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cellimg_dask.cli.require import require
from cellimg_dask.schemas.description import is_description

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    from cellimg_dask.batch.spec import Spec, Stage

__all__ = ["place_of", "read_spec", "refuse", "write_resolved"]


def read_spec(path: Path, changes: Sequence[str] = (), target: str | None = None) -> Spec:
    """Return the spec in a file.

    Parameters
    ----------
    path : Path
        A YAML file.
    changes : sequence of str
        ``key=value``, for instance ``stages.cells.halo=4``.
    target : str, optional
        In place of the spec's, as seen from the working folder.

    Raises
    ------
    click.UsageError
        If something is wrong with it, all of which is told.
    """
    yaml: Any = require("yaml", "batch")
    require("pydantic", "batch")
    from cellimg_dask.batch.spec import Spec

    try:
        content = _parsed(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise click.UsageError(f"{path} must hold entries such as target: out.zarr")
    for change in changes:
        _set(content, change)
    if target is not None:
        if "stages" in content:
            raise click.UsageError(
                "--target is for a spec without stages; give --set stages.NAME.target=PATH"
            )
        # As whoever typed it sees it, and not from the spec's folder.
        content["target"] = _absolute(Path(), target)
    stages, cache_bytes, mistakes = _checked(content)
    spec = Spec(stages, cache_bytes)
    mistakes = mistakes or spec.mistakes()
    refuse(path, mistakes)
    return spec


def refuse(path: Path, mistakes: dict[str, str]) -> None:
    """Say what is wrong with a spec, if anything is: the entry, and what is expected."""
    if mistakes:
        lines = [f"  {name}: {text}" for name, text in mistakes.items()]
        raise click.UsageError("\n".join([f"{path} has mistakes:", *lines]))


def _set(content: dict[Any, Any], change: str) -> None:
    """Replace an entry, or add it."""
    yaml: Any = require("yaml", "batch")
    name, sign, value = change.partition("=")
    if not sign:
        raise click.UsageError(f"--set {change}: give KEY=VALUE")
    *parents, last = name.split(".")
    place = content
    for depth, parent in enumerate(parents):
        if depth == 1 and parents[0] == "stages" and parent not in place:
            near = get_close_matches(parent, list(map(str, place)), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise click.UsageError(f"--set {change}: there is no stage {parent}{hint}")
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise click.UsageError(f"--set {change}: {parent} has no entries")
    try:
        place[last] = _parsed(value)
    except yaml.YAMLError as error:
        raise click.UsageError(f"--set {change}: {value!r} is no YAML: {error}") from error


def _checked(content: dict[Any, Any]) -> tuple[dict[str, Stage], int | None, dict[str, str]]:
    """Return the stages that are right, the bound of the cache, and what is wrong."""
    from cellimg_dask.batch.spec import Settings, WholeSpec, meaning

    stages: dict[str, Stage] = {}
    if "stages" not in content:
        content = dict(content)
        cache = {"cache_bytes": content.pop("cache_bytes")} if "cache_bytes" in content else {}
        whole, mistakes = _validated(WholeSpec, {"stages": {"_": {}}} | cache, "")
        stage, others = _validated_stage(content, "")
        mistakes |= others
        if content.get("target") is None:
            mistakes["target"] = f"is missing: {meaning('target')}"
        if stage is not None:
            stages[""] = stage
    else:
        whole, mistakes = _validated(WholeSpec, content, "")
        common = {
            key: content[key]
            for key in Settings.model_fields
            if key in content and not any(name.split(".")[0] == key for name in mistakes)
        }
        parts = content["stages"] if isinstance(content["stages"], dict) else {}
        for name, entries in parts.items():
            if isinstance(entries, dict):
                stage, others = _validated_stage(common | entries, f"stages.{name}.")
                mistakes |= others
                if stage is not None:
                    stages[str(name)] = stage
    return stages, None if whole is None else whole.cache_bytes, mistakes


def _validated_stage(content: dict[Any, Any], prefix: str) -> tuple[Any, dict[str, str]]:
    from cellimg_dask.batch.spec import KINDS

    kind = content.get("kind", "image")
    if not isinstance(kind, str) or kind not in KINDS:
        *most, last = map(repr, KINDS)
        text = f"must be {', '.join(most)} or {last}, got {kind!r}"
        return None, {f"{prefix}kind": text}
    return _validated(KINDS[kind], content, prefix)


def _validated(
    model: type[BaseModel], content: dict[Any, Any], prefix: str
) -> tuple[Any, dict[str, str]]:
    pydantic: Any = require("pydantic", "batch")

    try:
        return model.model_validate(content), {}
    except pydantic.ValidationError as error:
        found = _mistakes(error, content, model)
        return None, {
            (f"{prefix}{name}" if name else prefix.rstrip(".") or "spec"): text
            for name, text in found.items()
        }


def _mistakes(error: ValidationError, content: Any, model: type[BaseModel]) -> dict[str, str]:
    """Return what is wrong: the entry, which may be empty for all, and what is expected of it."""
    from cellimg_dask.batch.spec import entries, meaning

    found: dict[str, str] = {}
    for item in error.errors():
        # Down to the entry, and not into the alternatives for its value.
        place, path = content, []
        for depth, part in enumerate(item["loc"], 1):
            if part == 0 and not isinstance(place, list):
                # The only input need not be in a list.
                continue
            try:
                place = place[part]
            except (KeyError, IndexError, TypeError):
                if item["type"] in ("missing", "extra_forbidden") and depth == len(item["loc"]):
                    path.append(str(part))
                break
            path.append(str(part))
        name = ".".join(path)
        whole = path[-1:] == [str(part) for part in item["loc"][-1:]] != []
        if item["type"] == "missing" and whole:
            found[name] = f"is missing: {meaning(path[-1], model)}"
        elif item["type"] == "extra_forbidden":
            near = get_close_matches(path[-1], entries(), 1)
            found[name] = "no such entry" + (f"; did you mean {near[0]}?" if near else "")
        elif item["type"] == "value_error":
            found[name] = item["msg"].removeprefix("Value error, ")
        elif whole and "Input should be" in item["msg"]:
            found[name] = f"{item['msg'].replace('Input should', 'must')}, got {place!r}"
        else:
            # None of several alternatives fits.
            found[name] = f"cannot be {place!r}: {meaning(path[0], model)}"
    return found


def _parsed(text: str) -> Any:
    """Return what YAML text says; what looks like a date stays text, as JSON would have it."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML is not typed
        """As safe, without dates."""

    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if not tag.endswith(":timestamp")]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    return yaml.load(text, Loader)


def place_of(target: str, folder: Path) -> str:
    """Return where a target is that a spec in ``folder`` names."""
    return target if "://" in target else str(folder / target)


def write_resolved(spec: Spec, name: str, folder: Path, *, replace: bool) -> None:
    """Write the spec with all its defaults beside a stage's target, to be run as it is."""
    import yaml

    from cellimg_dask.batch.folder import open_folder
    from cellimg_dask.batch.manifest import run_folder

    stages = {name: _resolved(spec, name, folder) for name in spec.stages}
    content: dict[str, Any] = stages.get("", {"stages": stages})
    text = yaml.safe_dump(content | {"cache_bytes": spec.cache_bytes}, sort_keys=False)
    target = spec.stages[name].target
    assert target is not None
    beside = open_folder(run_folder(place_of(target, folder)))
    # One that is there may be that of a run which works on the target.
    if replace or beside.read("spec.yaml") is None:
        beside.write("spec.yaml", text.encode())


def _resolved(spec: Spec, name: str, folder: Path) -> dict[str, Any]:
    stage = spec.stages[name]
    content: dict[str, Any] = stage.model_dump(mode="json")
    if stage.target is not None:
        content["target"] = _absolute(folder, stage.target)
    for entry in stage.input_entries:
        value = content[entry]
        for item in value if isinstance(value, list) else [value] * (value is not None):
            if item["path"] not in spec.stages:
                item["path"] = _absolute(folder, item["path"])
    for entry in ("function", "load_model"):
        if content.get(entry) is not None:
            content[entry] = _absolute_function(folder, content[entry])
    env = content["queue"]["env"]
    if env is not None:
        if env["venv"] is not None:
            env["venv"] = _absolute(folder, env["venv"])
        for tool in ("conda", "pixi"):
            if env[tool] is not None and env[tool]["file"] is not None:
                env[tool]["file"] = _absolute(folder, env[tool]["file"])
    if "extra_properties" in content:
        content["extra_properties"] = [
            _absolute_function(folder, given)
            if isinstance(given, str)
            else [_absolute_function(folder, given[0]), given[1]]
            for given in content["extra_properties"]
        ]
    # What was not given is not there: it may not go together with the rest.
    given = stage.model_fields_set | {"kind"}
    return {key: value for key, value in content.items() if value is not None or key in given}


def _absolute_function(folder: Path, name: str) -> str:
    return _absolute(folder, name) if ".py:" in name or is_description(name) else name


def _absolute(folder: Path, name: str) -> str:
    return name if "://" in name else str(folder.absolute() / name)
