"""Recipes: YAML files with the settings of a run."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

__all__ = ["parse_with_recipe"]

# Settings in a run's `args.yaml` that apply to that run only.
_NO_SETTINGS = ("recipe", "output", "resume", "eval", "dry_run", "device")


def parse_with_recipe(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, folder: Path, name: str
) -> argparse.Namespace:
    """Parses a command line on top of a recipe.

    The recipe's settings are parsed and checked like flags that come before the user's own.

    Args:
        parser: The argument parser.
        argv: The user's arguments, or None for those of the process.
        folder: Folder of the recipes, `NAME.yaml`.
        name: Name of a recipe, or a `*.yaml` file: the user's own, or a run's `args.yaml`.

    Returns:
        The parsed arguments.

    Raises:
        SystemExit: Raised by argparse if the recipe does not exist, or sets an unknown argument or an invalid value.
    """
    path = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not path.is_file():
        parser.error(f"no recipe {name}; there are {', '.join(sorted(p.stem for p in folder.glob('*.yaml')))}")
    flags: list[str] = []
    known = parser._option_string_actions
    for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        flag = f"--{key.replace('_', '-')}"
        if key in _NO_SETTINGS:
            continue
        if flag not in known:
            parser.error(f"recipe {name} sets {key}, which is no argument")
        if isinstance(value, bool):
            flags += [flag] if value else [f"--no-{flag[2:]}"] if f"--no-{flag[2:]}" in known else []
        elif value is not None:
            if isinstance(value, dict):
                value = [f"{name}={part}" for name, part in value.items()]
            flags += [flag, *map(str, value if isinstance(value, list) else [value])]
    return parser.parse_args([*flags, *(sys.argv[1:] if argv is None else argv)])
