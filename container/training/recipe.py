"""Recipes: YAML files with the settings of a run."""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from container.files import read_text

__all__ = ["number", "parse_with_recipe"]

# Settings in a run's `args.yaml` that apply to that run only.
_NO_SETTINGS = ("recipe", "output", "resume", "eval", "dry_run", "device")
_OFF = ("aa", "ema_decay")  # settings of `paper` that null turns off


def number(kind: type[int] | type[float], values: str) -> Callable[[str], Any]:
    """Returns a `type` for argparse that accepts the finite numbers of an interval.

    Args:
        kind: `int` or `float`.
        values: The interval as in mathematics: `[0, 1)` has 0 and not 1. An end may be `inf`.
    """
    low, high = map(float, values[1:-1].split(","))

    def read(text: str) -> Any:
        value = kind(text)
        above = value >= low if values[0] == "[" else value > low
        below = value <= high if values[-1] == "]" else value < high
        if not (above and below and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} is not in {values}")
        return value

    read.__name__ = kind.__name__  # argparse names it: "invalid int value"
    return read


def _is_setting(value: Any) -> bool:
    """Whether a value of YAML is a scalar, a list of scalars, or a dictionary of these; no string looks like a flag.

    A list in a list could be as large as memory, by YAML's aliases.
    """
    if isinstance(value, dict):
        return all(
            isinstance(key, str) and _is_setting(part) and not isinstance(part, dict) for key, part in value.items()
        )
    parts = value if isinstance(value, list) else [value]
    return all(
        part is None or isinstance(part, bool | int | float) or (isinstance(part, str) and not part.startswith("-"))
        for part in parts
    )


def parse_with_recipe(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, folder: Path, name: str
) -> argparse.Namespace:
    """Parses a command line on top of a recipe.

    The recipe's settings are parsed and checked like flags that come before the user's own.

    Args:
        parser: The argument parser.
        argv: The user's arguments, or None for those of the process.
        folder: Folder of the recipes, `NAME.yaml`. One of them is `paper`, which has every setting a run needs.
        name: Name of a recipe, or a `*.yaml` file: the user's own, or a run's `args.yaml`.

    Returns:
        The parsed arguments.

    Raises:
        SystemExit: Raised by argparse if the recipe does not exist, or sets an unknown argument or an invalid value, or
            if it leaves out a setting that has no default and is not among the user's arguments.
    """
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.is_file():
        parser.error(f"no recipe {name}; there are {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}")
    try:
        settings = yaml.safe_load(read_text(path))
    except (RecursionError, ValueError, yaml.YAMLError) as error:
        parser.error(f"recipe {name} is no YAML: {' '.join(str(error).split())}")
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        parser.error(f"recipe {name} has no lines of KEY: VALUE")
    flags: list[str] = []
    known = parser._option_string_actions
    for key, value in settings.items():
        flag = f"--{key.replace('_', '-')}"
        if key in _NO_SETTINGS:
            continue
        if flag not in known:
            parser.error(f"recipe {name} sets {key}, which is no argument")
        if not _is_setting(value):
            parser.error(f"recipe {name} sets {key} to what is neither a value nor a list of values")
        if isinstance(value, bool):
            flags += [flag] if value else [f"--no-{flag[2:]}"] if f"--no-{flag[2:]}" in known else []
        elif value is not None:
            if isinstance(value, dict):
                value = [f"{name}={part}" for name, part in value.items()]
            flags += [flag, *map(str, value if isinstance(value, list) else [value])]
    args = parser.parse_args([*flags, *(sys.argv[1:] if argv is None else argv)])
    paper = yaml.safe_load((folder / "paper.yaml").read_text(encoding="utf-8"))
    needed = [key for key, value in paper.items() if value is not None and not (key in _OFF and key in settings)]
    if missing := [key for key in needed if getattr(args, key) is None]:
        parser.error(f"recipe {name} does not set {', '.join(missing)}; a whole one is {folder / 'paper.yaml'}")
    return args
