"""Chunked cross-entropy against torch's own on all logits at once."""

import pytest
import torch

import rankscope.train.loss
from marks import mostly_slow
from models import CONFIGS, tiny_model
from rankscope.train.loss import Head, label_losses


@pytest.mark.parametrize("chunk_bytes", [1, 4 * 131 * 100, 2**26])
def test_equals_cross_entropy(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int) -> None:
    monkeypatch.setitem(rankscope.train.loss.CHUNK_BYTES, "cpu", chunk_bytes)
    torch.manual_seed(0)
    weight = torch.randn(131, 16)
    hidden, targets, weights = torch.randn(300, 16), torch.randint(0, 131, (300,)), torch.rand(300)
    mine, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    got = label_losses(lambda h, _: h @ weight.T, mine, targets, weights)
    logits = theirs @ weight.T
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (3 * got.total).backward()
    (3 * expected @ weights).backward()
    torch.testing.assert_close(got.losses, expected.detach())
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert not len(got.correct), "a pass over the logits that training does not need"


def test_evaluation_counts_hits_and_works_out_no_gradient() -> None:
    weight, hidden = torch.randn(131, 16), torch.randn(9, 16)
    logits = hidden @ weight.T
    targets = torch.where(torch.arange(9) < 4, logits.argmax(-1), logits.argmin(-1))
    with torch.no_grad():
        got = label_losses(lambda h, _: h @ weight.T, hidden, targets, torch.ones(9))
    assert not got.total.requires_grad
    assert got.correct.tolist() == [True] * 4 + [False] * 5


def test_the_heads_own_weights_are_found_without_a_walk_of_the_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for at each forward. An output layer that shares the trunk's weight has it all the same."""

    def walked(*_: object, **__: object) -> None:
        raise AssertionError

    for tied in (False, True):
        model = tiny_model("llama-gqa").requires_grad_()
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        head = Head(model)
        for name in ("parameters", "named_modules"):
            monkeypatch.setattr(model.model, name, walked)
        assert [id(weight) for weight in head.trained] == [id(model.lm_head.weight)]


@pytest.mark.parametrize("name", mostly_slow(CONFIGS, "opt-post-norm", "gemma2"))
def test_head_is_the_models_own(name: str) -> None:
    """Soft-capping and the like included: the head of the trunk's hidden states gives the model's logits."""
    model = tiny_model(name)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        hidden = getattr(model, model.base_model_prefix)(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(Head(model)(hidden), model(input_ids=ids).logits[0])
