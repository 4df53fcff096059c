"""Calibration counts what a slow look at the finished texts counts, and stores the trees that follow."""

from pathlib import Path
from typing import Any

import pytest
import torch

from foretoken import saved as store
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.heads import best_paths, expected
from foretoken.noise import Noise
from foretoken.sampling import Sampling
from foretoken.training.calibrate import RANKS, accuracies, calibrate
from tests.families import make
from tests.reference import reference
from tests.test_heads import batch_of, drafter_of, hiddens
from tests.test_saved import written

PROMPTS = [[5, 9, 12, 5, 9, 12, 5], [7, 3], list(range(30, 41))]
TOKENS = 14


def counted(target: Any, drafter: Any, temperature: float, seed: int) -> torch.Tensor:
    """The shares by definition: each finished text, each place, each head's choices there."""
    depths = drafter.heads.architecture.heads
    right, places = torch.zeros(depths, RANKS, dtype=torch.float64), 0
    for number, prompt in enumerate(PROMPTS):
        sampling = Sampling(temperature=temperature, seed=seed)
        text = prompt + reference(target.model, prompt, sampling, number=number, max_new_tokens=TOKENS)
        noise = Noise.of([seed], [number], torch.device("cpu"))
        tokens = torch.tensor([text])
        with torch.no_grad():
            states = target.decoder(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
            logits = hiddens(drafter.stages(batch_of(tokens)), states[-1])
        for root in range(len(prompt), len(text) - depths):
            places += 1
            for depth in range(1, depths + 1):
                at = root + depth
                values = logits[depth + 1][0, root - 1]
                gumbel = noise.gumbel(torch.tensor([[at]]), torch.arange(target.vocab))[0, 0]
                order = (values + temperature * gumbel).argsort(descending=True)[:RANKS]
                right[depth - 1] += order == text[at]
    return right / places


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_shares_are_what_a_slow_count_finds(temperature: float):
    target = make("llama")
    drafter = drafter_of("medusa", target)
    found = accuracies(target, drafter, PROMPTS, temperature=temperature, max_new_tokens=TOKENS, seed=3)
    torch.testing.assert_close(found, counted(target, drafter, temperature, 3))
    assert found.sum() > 0


def test_trees_are_stored_and_used(tmp_path: Path):
    target = make("llama")
    written(tmp_path, target)
    trees = calibrate(target, f"medusa:{tmp_path}", PROMPTS, nodes=5, max_new_tokens=TOKENS)
    assert sorted(trees) == ["0", "1"]
    for temperature, tree in trees.items():
        assert tree.paths == best_paths(tree.accuracy, 5)
        assert tree.tokens_per_forward == pytest.approx(expected(tree.accuracy, tree.paths))
        assert store.read(tmp_path).trees[temperature] == tree.paths
    drafter: Any = make_drafter(f"medusa:{tmp_path}", target)
    assert drafter.plan.paths(0.9) == trees["1"].paths


def test_what_cannot_be_measured_says_so():
    target = make("llama")
    with pytest.raises(UserError, match="Only heads"):
        accuracies(target, make_drafter("suffix", target), PROMPTS, temperature=0, max_new_tokens=9, seed=0)
    with pytest.raises(UserError, match="No output is 4 tokens long"):
        accuracies(target, drafter_of("medusa", target), PROMPTS, temperature=0, max_new_tokens=3, seed=0)
