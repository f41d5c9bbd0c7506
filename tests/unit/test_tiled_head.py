"""The head over tiles of the vocabulary against full logits, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gft_lite.policy import scoring, tiled_head
from gft_lite.policy.scoring import OutputHead

VOCABULARY, TOKENS, HIDDEN = 1000, 150, 32


@pytest.fixture
def case():
    """States of some certain and some uncertain tokens, targets, and weights of the loss."""
    torch.manual_seed(0)
    module = nn.Linear(HIDDEN, VOCABULARY, bias=False)
    hidden = torch.randn(TOKENS, HIDDEN)
    hidden[::3] *= 20
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[::2] = module(hidden[::2]).argmax(1)
    return module, hidden, targets, torch.randn(TOKENS)


def use_tiles(monkeypatch, words):
    for module in (scoring, tiled_head):
        monkeypatch.setattr(module, "HEAD_TILE_WORDS", words)


def loss_of(weights):
    """Rectified as GFT's, with the entropy as a further factor: a loss of its own slice."""

    def loss(scores, span):
        factor = torch.where(scores.logprobs.exp() < 0.3, scores.logprobs.exp(), 1.0).detach()
        return (weights[span] * factor * scores.entropy * scores.logprobs).sum()

    return loss


@pytest.mark.parametrize("words", [1000, 300, 77])
@pytest.mark.parametrize("tokens", [512, 64, 7])
def test_values_and_gradients_are_those_of_full_logits(case, words, tokens, monkeypatch):
    module, hidden, targets, weights = case
    use_tiles(monkeypatch, words - 1)
    monkeypatch.setattr(scoring, "HEAD_TILE_TOKENS", {"cpu": tokens})
    head = OutputHead(module, VOCABULARY, hidden.device, torch.float32)
    value, gradient, scores = head.loss_gradient(hidden, targets, loss_of(weights))
    exact = hidden.double().requires_grad_()
    logp = (exact @ module.weight.double().T).log_softmax(-1)
    plain = scoring.TokenScores(
        logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1).detach()
    )
    total = loss_of(weights)(plain, slice(None))
    total.backward()
    assert (scores.logprobs - plain.logprobs).abs().max() < 1e-4
    assert (scores.entropy - plain.entropy).abs().max() < 1e-4
    assert value == pytest.approx(total.item(), rel=1e-5)
    assert (gradient - exact.grad).norm() < 2e-5 * exact.grad.norm()


def test_tiles_and_whole_rows_agree_and_the_latter_serve_small_vocabularies(case, monkeypatch):
    module, hidden, targets, weights = case
    head = OutputHead(module, VOCABULARY, hidden.device, torch.float32)
    calls = []
    plain = scoring.tiled_head
    monkeypatch.setattr(scoring, "tiled_head", lambda *a: calls.append(1) or plain(*a))
    rows = head.loss_gradient(hidden, targets, loss_of(weights))
    assert not calls
    use_tiles(monkeypatch, 128)
    tiles = head.loss_gradient(hidden, targets, loss_of(weights))
    assert calls
    assert (tiles[1] - rows[1]).norm() < 5e-5 * rows[1].norm()
    assert (tiles[2].logprobs - rows[2].logprobs).abs().max() < 1e-4
    assert tiles[0] == pytest.approx(rows[0], rel=1e-4)


def test_tiles_are_not_used_for_the_gradient_of_the_entropy(case, monkeypatch):
    module, hidden, targets, weights = case
    use_tiles(monkeypatch, 128)
    head = OutputHead(module, VOCABULARY, hidden.device, torch.float32)
    exact = hidden.clone().requires_grad_()
    scores = head.scores(exact, targets, entropy_gradient=True)
    loss_of(weights)(scores, slice(None)).backward()
    found = head.loss_gradient(hidden, targets, loss_of(weights), entropy_gradient=True)
    assert (found[1] - exact.grad).norm() < 5e-5 * exact.grad.norm()


def test_a_certain_token_keeps_the_digits_of_its_small_gradient(case, monkeypatch):
    """Where p_t is near 1, W_t minus the mean of W would cancel to rounding errors."""
    module, hidden, _, _ = case
    use_tiles(monkeypatch, 128)
    hidden = hidden[::3]
    targets = module(hidden).argmax(1)
    found = tiled_head.tiled_head(hidden, module.weight, targets, torch.float32)
    exact = hidden.double().requires_grad_()
    logp = (exact @ module.weight.double().T).log_softmax(-1).gather(1, targets[:, None])
    logp.sum().backward()
    certain = logp[:, 0].topk(10).indices
    assert logp[certain].min() > -0.05 and logp[certain].max() > -1e-3
    gap = (found.slope - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert gap[certain].max() < 1e-4


def test_in_bf16_only_the_products_are_rounded(case, monkeypatch):
    module, hidden, targets, _ = case
    use_tiles(monkeypatch, 128)
    hidden, weight = hidden / 4, module.weight.detach().bfloat16()
    found = tiled_head.tiled_head(hidden, weight, targets, torch.bfloat16)
    logp = (hidden.bfloat16() @ weight.T).float().log_softmax(-1)
    assert (found.logprobs - logp.gather(1, targets[:, None])[:, 0]).abs().max() < 1e-4
    assert (found.entropy + (logp.exp() * logp).sum(1)).abs().max() < 1e-4
    p = torch.zeros_like(logp).scatter_(1, targets[:, None], 1.0) - logp.exp()
    exact = p.double() @ weight.double()
    assert (found.slope - exact).norm() < 1e-2 * exact.norm()
