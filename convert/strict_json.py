"""Read JSON that a stranger wrote: one meaning per text, or an error.

Python's `json` accepts repeated keys (the last wins), `NaN`, lone surrogates and integers of any length. Two readers of
such a file may see two different checkpoints, so each is refused here.
"""

import json
from collections.abc import Callable
from typing import NoReturn

from ..errors import CheckpointError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def parse_json(data: bytes, label: str, *, parse_int: Callable[[str], int] = int) -> Json:
    """Return the value of the UTF-8 JSON text `data`.

    Args:
        data: the whole text, bytes.
        label: what to call it in an error, such as `model-1.safetensors: header`.
        parse_int: turns the digits of an integer into a number; may raise ValueError.
    Raises:
        CheckpointError: not UTF-8, not JSON, a repeated key, a constant JSON does not have, nested too deep.
    """

    def pairs(items: list[tuple[str, Json]]) -> dict[str, Json]:
        value = dict(items)
        if len(value) != len(items):
            names = [name for name, _ in items]
            repeated = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{label}: the key {repeated!r} is there twice. Write the file again.")
        return value

    def constant(text: str) -> NoReturn:
        raise CheckpointError(f"{label}: {text} is not JSON. Write the file again.")

    try:
        text = data.decode("utf-8")
        value: Json = json.loads(text, object_pairs_hook=pairs, parse_constant=constant, parse_int=parse_int)
        if "\\u" in text:  # an escaped lone surrogate decodes to a string that is no Unicode text
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except CheckpointError:
        raise
    except RecursionError:
        raise CheckpointError(f"{label}: nested too deep for any checkpoint. Is this file what it claims?") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, too many digits
        raise CheckpointError(f"{label}: not valid JSON ({error}). Is the download complete?") from None
    return value


def parse_object(data: bytes, label: str) -> dict[str, Json]:
    """`parse_json`, for a text that must be an object.

    Raises:
        CheckpointError: as `parse_json`; or the text is another kind of value.
    """
    value = parse_json(data, label)
    if not isinstance(value, dict):
        raise CheckpointError(f"{label}: expected a JSON object, found {type(value).__name__}.")
    return value
