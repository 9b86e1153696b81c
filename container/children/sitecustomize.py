"""Imported by Python in the processes that `container run` starts, where importing timm registers the family.

`container run` puts this folder in front of PYTHONPATH, so no other process reads it. Nothing is imported that the
process does not import: the family comes with timm, once timm itself is there.
"""

import importlib
import importlib.util
import os
import sys
from typing import Any


class AfterTimm:
    """Finds timm as usual, and imports `container` right after it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """timm's own spec, whose loader also imports `container`; None for other modules."""
        if name != "timm":
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:  # looking for timm does not import it: transformers only looks
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
    """What Python would have read in place of this file, if there is one."""
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
