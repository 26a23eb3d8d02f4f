"""A column of any values: JSON text in Arrow, the values themselves in Python.

datasets' own `Json` reads with pandas, which changes the last digit of many fractions and refuses numbers of more than
64 bits. This one gives back what the file held, and its objects keep exactly their own keys.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
from datasets.features.features import register_feature

from byeori.data.readers.jsonl import DECODER


@dataclass
class JsonValue:
    """The feature of such a column."""

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "json"
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="JsonValue", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: object) -> str | None:
        """Return a value as JSON text."""
        return None if value is None else dumps(value)

    def decode_example(self, text: str | None, token_per_repo_id: object = None) -> Any:
        """Return the value of JSON text."""
        return None if text is None else DECODER.decode(text)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        """Return an Arrow array of JSON text as it is."""
        return storage


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # it is called experimental
    register_feature(JsonValue, "JsonValue")


def dumps(value: object) -> str:
    """Return a value as JSON text that Arrow can hold: half a surrogate pair as an escape, a date as text."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, default=str)
    return text
