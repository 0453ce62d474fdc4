"""What is said, as bytes: JSON, or pickle between processes that trust each other.

Not `json.dumps` and `json.loads`, which for a small message spend most of their time on arguments.
"""

from __future__ import annotations

import json
import pickle
from typing import Any

from prefork.errors import FrameError
from prefork.ipc.fds import Buffer

# Text goes as UTF-8 rather than as escapes, which are longer and slower. JSON of a lone surrogate is
# what it always was: "surrogatepass" both ways.
_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False).encode
_decoder = json.JSONDecoder()


def to_json(message: Any) -> bytes:
    """Raises TypeError or ValueError for what JSON cannot hold."""
    return _encode(message).encode("utf-8", "surrogatepass")


def from_json(payload: Buffer) -> Any:
    """Raises FrameError for what is no JSON."""
    try:
        text = str(payload, "utf-8", "surrogatepass")
        message, end = _decoder.raw_decode(text)  # what `to_json` writes has no space around it
        return message if end == len(text) else _decoder.decode(text)
    except (ValueError, RecursionError) as exc:
        raise FrameError(f"a frame of {len(payload)} bytes does not hold JSON: {exc}") from exc


def to_pickle(message: Any) -> bytes:
    """Raises what the objects in *message* raise."""
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


from_pickle = pickle.loads
