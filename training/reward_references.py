"""Reward functions of the user's own, named in a recipe as `module:function`."""

import importlib
import os
import re
import sys
from typing import Any

from metis_home.errors import RecipeError

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_reference(name: object) -> bool:
    """Has it the form `package.module:function`?"""
    return isinstance(name, str) and _REFERENCE.fullmatch(name) is not None


def load_reference(name: str) -> Any:
    """Import the module, which may lie in the working directory, and return what it calls by that name.

    Raises:
        RecipeError: there is no such module, its import fails, or it has no such function.
    """
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    is_new = here not in sys.path
    if is_new:
        sys.path.append(here)  # last: a file here replaces no installed module
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise RecipeError(
            f"reward {name!r}: importing {module_name} failed: {type(error).__name__}: {error}"
        ) from error
    finally:
        if is_new and here in sys.path:
            sys.path.remove(here)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise RecipeError(f"reward {name!r}: {module_name} has no function {attribute!r}")
    return found
