"""Makes importing timm register the family, in the processes that `container run` starts.

Python imports this file at start-up, because `container run` puts its folder first in PYTHONPATH. No other process
reads it. It does not import timm itself: `container` is imported only if the process imports timm, right after timm.
"""

import importlib
import importlib.util
import os
import sys
from typing import Any


class AfterTimm:
    """Import hook that finds timm as usual and imports `container` right after it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Returns timm's own spec, with a loader that also imports `container`; None for other modules."""
        if name != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:  # a lookup must not import: transformers only looks for timm
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_both(module: Any) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    importlib.import_module("container")

            loader.exec_module = execute_both
        return spec


def _read_the_next() -> None:
    """Imports the `sitecustomize` that Python would have found without this file, if there is one."""
    del sys.modules["sitecustomize"]
    try:
        importlib.import_module("sitecustomize")
    except ModuleNotFoundError as error:
        if error.name != "sitecustomize":
            raise
    finally:
        sys.modules.setdefault("sitecustomize", this)


this = sys.modules["sitecustomize"]
here = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
if importlib.util.find_spec("container") is None:  # a checkout that is not installed
    sys.path.append(os.path.dirname(os.path.dirname(here)))
sys.meta_path.insert(0, AfterTimm())
_read_the_next()
