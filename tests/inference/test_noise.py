"""Noise is a function of what is chosen, and draws from the distribution of the logits."""

import torch

from megatron_qwen.inference.noise import gumbel, stream_key

CPU = torch.device("cpu")


def test_it_depends_on_everything_that_names_a_choice():
    key = stream_key(3, [1, 2, 3], 0)
    first = gumbel(key, 7, 0, 50, device=CPU)
    assert torch.equal(gumbel(key, 7, 0, 50, device=CPU), first)
    assert torch.equal(gumbel(key, 7, 20, 30, device=CPU), first[20:]), "a part of the vocabulary has its own part"
    others = [stream_key(4, [1, 2, 3], 0), stream_key(3, [1, 23], 0), stream_key(3, [1, 2, 3], 1)]
    for other in (*(gumbel(one, 7, 0, 50, device=CPU) for one in others), gumbel(key, 8, 0, 50, device=CPU)):
        assert not bool((other == first).any())


def test_its_distribution():
    """Of the standard Gumbel distribution the mean is Euler's constant and the variance pi^2 / 6."""
    noise = torch.cat([gumbel(stream_key(0, [5], 0), position, 0, 2000, device=CPU) for position in range(100)])
    assert bool(noise.isfinite().all())
    assert abs(float(noise.mean()) - 0.57722) < 0.01
    assert abs(float(noise.var()) - 1.64493) < 0.03


def test_choices_have_the_probabilities_of_the_logits():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -4.0], dtype=torch.float64)
    draws, key = 20_000, stream_key(1, [9, 9], 2)
    chosen = [int((logits + gumbel(key, position, 0, 5, device=CPU)).argmax()) for position in range(draws)]
    expected = logits.softmax(0) * draws
    found = torch.bincount(torch.tensor(chosen), minlength=5)
    assert float(((found - expected).square() / expected).sum()) < 18.5, "chi square of 4 degrees, 0.1 %"
