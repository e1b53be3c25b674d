"""From the body of a request to examples, and from logits to what is answered."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from secateur.errors import InvalidData
from secateur.runtime import Engine
from secateur.runtime.encoder import out_of_range
from secateur.serving.batching import Example
from secateur.serving.refusals import Refused
from secateur.tasks.batching import token_limit

FORM = 'Send {"texts": ["a text", ["a pair", "of them"]]} or {"ids": [[101, 2023, 102]]}'


class Reader:
    """Reads requests: JSON to checked token ids.

    Args:
        engine: whose tokenizer and tables say what is valid.
        most: examples in a request.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        self.plan, self.tokenizer, self.most = engine.plan, engine.tokenizer, most

    def examples(self, body: bytes) -> list[Example]:
        """Examples of a request; texts are cut to what the model reads.

        Raises:
            InvalidData: no JSON, another form, or ids that the model does not read.
            Refused: too many examples.
        """
        try:
            given = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise InvalidData(f"The body is no JSON ({str(error) or type(error).__name__}). {FORM}.") from None
        if not isinstance(given, dict) or len(given) != 1 or not given.keys() <= {"texts", "ids"}:
            raise InvalidData(f"{FORM}, one of them and nothing else.")
        ((kind, rows),) = given.items()
        if not isinstance(rows, list) or not rows:
            raise InvalidData(f"'{kind}' is a list of at least one example. {FORM}.")
        if len(rows) > self.most:
            raise Refused(413, f"{len(rows)} examples are too many for one request: send {self.most} at most.")
        if kind == "texts":
            return self._of_texts(rows)
        found = [Example(_ids(row)) for row in rows]
        for example in found:
            self._check(example.ids)
        return found

    def _of_texts(self, rows: list[Any]) -> list[Example]:
        if self.tokenizer is None:
            raise InvalidData("This model has no tokenizer: send token ids.")
        texts = [tuple(row) if isinstance(row, list) else row for row in rows]
        for text in texts:
            if not isinstance(text, str) and not (
                isinstance(text, tuple) and len(text) == 2 and all(isinstance(part, str) for part in text)
            ):
                raise InvalidData(f"'texts' are texts, or pairs of them. {FORM}.")
        longest = min(self.plan.longest, token_limit(self.tokenizer))
        try:
            found = self.tokenizer(texts, truncation=True, max_length=longest)
        except (TypeError, ValueError, OverflowError) as error:  # such as half a surrogate pair
            raise InvalidData(f"The tokenizer does not read a text: {str(error).splitlines()[0]}") from None
        if not all(found["input_ids"]):
            raise out_of_range(self.plan, 2)
        types = found.get("token_type_ids") if self.plan.types is not None else None
        return [Example(ids, types[i] if types else None) for i, ids in enumerate(found["input_ids"])]

    def _check(self, ids: list[int]) -> None:
        if not 1 <= len(ids) <= self.plan.longest:
            raise out_of_range(self.plan, 2)
        if min(ids) < 0 or max(ids) >= len(self.plan.words):
            raise out_of_range(self.plan, 1)
        if self.plan.padding in ids:
            raise InvalidData(f"Leave padding ({self.plan.padding}) out: examples have the lengths that they have.")


def _ids(row: Any) -> list[int]:
    if not isinstance(row, list) or any(type(i) is not int for i in row):
        raise InvalidData(f"'ids' are lists of whole numbers. {FORM}.")
    return row


class Writer:
    """Writes what a model says of an example.

    Args:
        config: of the model: names of labels, and whether they are classes, several at a time, or a number.
    """

    def __init__(self, config: Any) -> None:
        self.names = [config.id2label[i] for i in range(config.num_labels)]
        self.kind = getattr(config, "problem_type", None)

    def prediction(self, example: Example, logits: Tensor) -> dict[str, Any]:
        """What is answered of an example; of a classifier of tokens that of each token."""
        if logits.dim() == 1:
            return self._row(logits.tolist())
        tokens = zip(example.ids, logits.tolist(), strict=True)
        return {"tokens": [{"id": number, **self._row(row)} for number, row in tokens]}

    def _row(self, logits: list[float]) -> dict[str, Any]:
        if len(logits) == 1:
            return {"logits": logits, "value": logits[0]}
        if self.kind == "regression":
            return {"logits": logits, "values": dict(zip(self.names, logits, strict=True))}
        scores = _sigmoids(logits) if self.kind == "multi_label_classification" else _softmax(logits)
        best = max(range(len(scores)), key=scores.__getitem__)
        return {"logits": logits, "label": self.names[best], "scores": dict(zip(self.names, scores, strict=True))}


def _softmax(logits: Sequence[float]) -> list[float]:
    most = max(logits)
    found = [math.exp(x - most) for x in logits]
    total = sum(found)
    return [x / total for x in found]


def _sigmoids(logits: Sequence[float]) -> list[float]:
    return [0.5 + 0.5 * math.tanh(x / 2) for x in logits]
