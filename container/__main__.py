"""`python -m container SCRIPT ...` runs a timm script (train.py, validate.py, ...) with the models registered."""

import os
import runpy
import sys


def main() -> None:
    """Runs the script named by the first argument with the rest of them, as `python SCRIPT ...` would."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m container SCRIPT [ARGUMENT ...]")
    del sys.argv[0]
    if not os.path.isfile(sys.argv[0]):
        raise SystemExit(f"no script at {sys.argv[0]}")
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
