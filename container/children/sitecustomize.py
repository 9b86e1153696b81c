"""Makes importing timm register the family, in the processes that `container run` starts.

Python imports this file at start-up, because `container run` puts its folder first in PYTHONPATH. In another
interpreter than the one of `container run` it does nothing. It does not import timm itself: this package is loaded only
if the process imports timm, right after timm. It is loaded from its own place, whatever else is called `container`.
"""

import importlib
import importlib.util
import os
import sys
from typing import Any


class AfterTimm:
    """Import hook that finds timm as usual and loads this package right after it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Returns timm's own spec, with a loader that also loads `container`, which is found if nothing else is."""
        if name not in ("timm", "container"):
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if name == "container":  # of a checkout that is not installed
            return spec or _own_spec()
        if spec is not None and spec.loader is not None:  # a lookup must not import: transformers only looks for timm
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_both(module: Any) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _load_package()

            loader.exec_module = execute_both
        return spec


def _own_spec() -> Any:
    return importlib.util.spec_from_file_location("container", os.path.join(package, "__init__.py"))


def _load_package() -> None:
    """Loads this package as `container`, unless the process has imported another module of that name."""
    imported: Any = sys.modules.get("container")
    if imported is None:
        other = importlib.util.find_spec("container")
        spec = _own_spec()
        if other is not None and other.origin != spec.origin:
            print(f"container run: `import container` is {spec.origin}, and not {other.origin}", file=sys.stderr)
        sys.modules["container"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    elif getattr(imported, "__file__", None) != os.path.join(package, "__init__.py"):
        print(f"container run: the models are not registered, as {imported} has their package's name", file=sys.stderr)


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
package = os.path.dirname(here)
sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
if os.environ.get("CONTAINER_RUN_PREFIX") == sys.prefix:
    sys.meta_path.insert(0, AfterTimm())
_read_the_next()
