"""Contract of the engine's operator: what it computes, what it says of shapes, and that compiled code may hold it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForTokenClassification

from secateur.errors import InvalidData, SecateurError
from secateur.runtime import load
from tests.contract.test_engine import wide_model
from tests.contract.test_engine_bits import binary
from tests.contract.test_engine_tokens import dialled


def ragged(*lengths: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.randint(5, 99, (sum(lengths),), generator=source), torch.tensor(lengths)


def of_tokens() -> Any:
    torch.manual_seed(0)
    return AutoModelForTokenClassification.from_config(wide_model().config).eval()


MODELS = {"dense": wide_model, "tokens": of_tokens, "binary": lambda: binary(wide_model())}


@pytest.mark.parametrize("tier", [None, "torch"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_operator_is_the_engine(kind: str, tier: str | None) -> None:
    engine = load(MODELS[kind](), tier=tier)
    module = engine.module()
    ids, lengths = ragged(9, 1, 30)
    types = torch.arange(40) % 2
    assert torch.equal(module(ids, lengths), engine.encoded(ids, lengths))
    assert torch.equal(module(ids, lengths, types), engine.encoded(ids, lengths, types))
    for given in ((ids, lengths), (ids, lengths, types)):
        torch.library.opcheck(torch.ops.secateur.encode, (module._key, *given))


@pytest.mark.parametrize("kind", MODELS)
def test_shapes_are_known_without_running(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(MODELS[kind]())
    module, given = engine.module(), ragged(9, 1, 30)
    wanted = engine.encoded(*given)
    monkeypatch.setattr(engine.encoder, "run", None)
    with FakeTensorMode() as mode:
        found = module(*map(mode.from_tensor, given))
    assert (found.shape, found.dtype, found.device) == (wanted.shape, wanted.dtype, wanted.device)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_calls_the_engine(backend: str) -> None:
    """In one graph, for batches of any size, at the setting of the dial that each call finds."""
    engine = load(dialled(wide_model()))
    module = engine.module()
    torch._dynamo.reset()

    def probabilities(ids: Tensor, lengths: Tensor) -> Tensor:
        return module(ids - 1, lengths).softmax(dim=-1)

    compiled = torch.compile(probabilities, fullgraph=True, backend=backend, dynamic=True)
    for speedup, lengths in ((1.0, (9, 1, 30)), (1.3, (9, 1, 30)), (1.3, (4, 17))):
        engine.speedup = speedup
        ids, counts = ragged(*lengths)
        wanted = engine.encoded(ids - 1, counts).softmax(dim=-1)
        assert torch.equal(compiled(ids, counts), wanted)


def test_an_engine_that_is_gone_is_named() -> None:
    module = load(wide_model()).module()
    given = ragged(3)
    assert module(*given).shape == (1, 3)  # the module keeps its engine
    module._engine.close()
    with pytest.raises(SecateurError, match="The engine is closed"):
        module(*given)
    key = module._key
    del module
    gc.collect()
    with pytest.raises(SecateurError, match="no such engine any more"):
        torch.ops.secateur.encode(key, *given)


def test_what_the_engine_refuses_the_operator_refuses() -> None:
    module = load(wide_model()).module()
    with pytest.raises(InvalidData, match="Token ids go from 0 to 98"):
        module(torch.tensor([99]), torch.tensor([1]))
    with pytest.raises(InvalidData, match="do not fit lengths"):
        module(*ragged(3)[:1], torch.tensor([4]))
