"""A compiled proposal drafts what the drafter drafts, from the same state, in every batch."""

from typing import Any

import pytest
import torch

import foretoken
from foretoken.compiled import CompiledTarget
from foretoken.decode import Request, Row
from foretoken.drafters import COMPILED, make_drafter
from foretoken.generation import decode_all
from foretoken.lowering import Lowered, lower
from foretoken.proposal import LONG, CompiledDrafter
from foretoken.rules import Match, Rejection, Rule
from foretoken.sampling import Sampling
from tests.models import BITSTORIES, STORIES, asset
from tests.test_equality import DRAFTERS, drafter_for, family, mixed_requests, prompts_of

KEYS = [key for key, (name, settings) in DRAFTERS.items() if name in COMPILED and "adaptive" not in settings]
CASES = [(key, "llama") for key in KEYS] + [
    (key, "gemma3") for key in ("draft_tree", "mtp_tree", "eagle_1", "deepseek")
]
"""Full attention, and a sliding window in some layers."""
FIRST = 6
"""Tokens of an output before any row comes near its end."""


def compiled(key: str, name: str, dtype: str) -> tuple[Any, CompiledDrafter]:
    """The drafter, and the same compiled with its target."""
    target, draft = family(name, dtype)
    step = CompiledTarget(target, inductor=False)
    drafter = drafter_for(key, target, draft)
    return drafter, CompiledDrafter(drafter, step)


def decoded(drafter: Any, target: Any, requests: list[Request], rule: Rule | None = None) -> list[Row]:
    return decode_all(target, drafter, requests, rule or Match(), batch_size=5)


@pytest.mark.parametrize(("key", "name"), CASES)
def test_drafts_and_outputs_are_those_of_the_drafter(key: str, name: str):
    """A ragged batch at three temperatures whose rows join and leave: tokens, and what was accepted.

    But for the last tokens: drafters guess no more than can still be emitted, programs do.
    """
    drafter, work = compiled(key, name, "float64")
    requests, want = mixed_requests(name, "float64")
    theirs = decoded(drafter, work.target.eager, requests)
    ours = decoded(work, work.target, requests)
    assert [r.output for r in ours] == want
    first = (0, 2, 3, 4)  # later rows join while others end; row 1 has a bias, which programs do not see
    assert [ours[i].drafted[:FIRST] for i in first] == [theirs[i].drafted[:FIRST] for i in first]
    pays = drafter.plan.worth is not None or drafter.plan.shape.stop > 0
    assert bool(work.programs) != pays, "what depends on the guesses' values is left to the drafter"


def test_a_program_that_drafts_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """The check above fails if the compiled proposal begins one row too early."""
    drafter, work = compiled("eagle_1", "llama", "float64")
    requests, want = mixed_requests("llama", "float64")
    honest = CompiledDrafter.taken

    def late(self: Any, out: list[torch.Tensor], facts: dict[str, Any], state: Any) -> Any:
        return honest(self, [*out[:4], *(x - 1 for x in out[4:])], facts, state)

    monkeypatch.setattr(CompiledDrafter, "taken", late)
    ours = decoded(work, work.target, requests)
    assert [r.output for r in ours] == want  # whatever is drafted
    theirs = decoded(drafter, work.target.eager, requests)
    assert [r.drafted for r in ours] != [r.drafted for r in theirs]


def test_greedy_and_sampled_drafts_are_two_programs():
    _, work = compiled("eagle_1", "llama", "float64")
    prompt = prompts_of(work.target)[0]
    for temperature in (0.0, 0.7, 0.0, 1.3):
        decoded(work, work.target, [Request(prompt, Sampling(temperature=temperature), 0, 12)])
    assert sorted(work.programs) == [0.0, 1.0]


@pytest.mark.parametrize("key", ["eagle_1", "deepseek_shared", "mtp_tree"])
def test_trees_are_made_without_a_product_of_torchs_own(key: str, monkeypatch: pytest.MonkeyPatch):
    """Beside one, a program's threads would not stay together."""
    seen: list[bool] = []

    def lowered(*args: Any) -> Lowered:
        found = lower(*args)
        seen.append(found.ours)
        return found

    monkeypatch.setattr("foretoken.program.lower", lowered)
    _, work = compiled(key, "llama", "float64")
    decoded(work, work.target, [Request(prompts_of(work.target)[0], Sampling(), 0, 6)])
    assert work.programs and len(seen) == 2 and all(seen)


def test_drawn_guesses_and_prompts_are_left_to_the_drafter():
    """Rejection rules need the drafter's law; a prompt is long."""
    drafter, work = compiled("draft_tree", "llama", "float64")
    requests = [Request(p, Sampling(temperature=0.8, seed=3), i, 12) for i, p in enumerate(prompts_of(work.target))]
    ours = decoded(work, work.target, requests, Rejection())
    theirs = decoded(drafter, work.target.eager, requests, Rejection())
    assert [r.output for r in ours] == [r.output for r in theirs]
    assert not work.programs
    seen: list[int] = []
    honest = drafter.propose
    work.drafter.propose = lambda feed, state: (seen.append(feed.tokens.shape[1]), honest(feed, state))[1]
    prompt = (prompts_of(work.target)[0] * 10)[: LONG + 1]
    decoded(work, work.target, [Request(prompt, Sampling(), 0, 12)])
    assert seen == [len(prompt)]
    assert work.programs


def test_a_drafter_of_a_compiled_target_is_compiled():
    """By name, in a hybrid, and when it is adaptive; one that copies is not."""
    target = CompiledTarget(asset(BITSTORIES), inductor=False)
    drafter: Any = make_drafter(f"draft_model:{STORIES}", target)
    assert isinstance(drafter, CompiledDrafter)
    adaptive: Any = make_drafter(f"draft_model:{STORIES}", target, {"adaptive": True})
    assert isinstance(adaptive.drafter, CompiledDrafter)
    hybrid: Any = make_drafter(f"hybrid:draft_model:{STORIES}", target)
    assert isinstance(hybrid.trained, CompiledDrafter)
    assert not isinstance(make_drafter("suffix", target), CompiledDrafter)
    for made in (drafter, adaptive, hybrid):
        outputs = foretoken.generate(target, ["Once upon a time", "Tom"], drafter=made, max_new_tokens=24)
        plain = foretoken.generate(target.eager, ["Once upon a time", "Tom"], drafter="none", max_new_tokens=24)
        assert [o.token_ids for o in outputs] == [o.token_ids for o in plain]
        assert all(sum(o.drafted) > 0 for o in outputs)


def test_the_end_of_the_context():
    """Drafts that reach beyond it are cut as the drafter's own are."""
    drafter, work = compiled("deepseek", "llama", "float64")
    target = work.target
    assert target.context is not None
    prompt = (prompts_of(target)[0] * 40)[: target.context - 6]
    requests = [Request(prompt, Sampling(), 0, 50), Request(prompt[:-3], max_new_tokens=50)]
    ours, theirs = decoded(work, target, requests), decoded(drafter, target.eager, requests)
    assert [r.output for r in ours] == [r.output for r in theirs]
    assert [len(r.output) for r in ours] == [6, 9]
