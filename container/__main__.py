"""`python -m container SCRIPT ...` runs a timm script (train.py, validate.py, ...) with the models registered."""

import runpy
import sys


def main() -> None:
    """Runs the script named by the first argument with the rest of them, as `python SCRIPT ...` would."""
    if len(sys.argv) < 2:
        raise SystemExit("usage: python -m container SCRIPT [ARGUMENT ...]")
    del sys.argv[0]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except FileNotFoundError as error:
        if error.filename != sys.argv[0]:
            raise
        raise SystemExit(f"no script at {sys.argv[0]}") from None


if __name__ == "__main__":
    main()
