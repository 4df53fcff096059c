"""Every drafter emits what plain decoding emits, token for token: the product.

The yardstick is `reference`: no cache, no batch, one forward of the whole prefix per token.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cache
from itertools import cycle
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import foretoken
from foretoken.adaptive import Adaptive
from foretoken.costs import Costs, Worth
from foretoken.decode import Request, Row, Session
from foretoken.drafter import Feed
from foretoken.drafters import METHODS, make_drafter, module_of
from foretoken.generation import decode_all
from foretoken.grow import Shape
from foretoken.limits import Rows
from foretoken.plan import Plan
from foretoken.rules import Match
from foretoken.sampling import Sampling
from foretoken.survival import Prior
from foretoken.target import Target
from tests.families import SUPPORTED, make
from tests.models import BITSTORIES, STORIES, asset
from tests.reference import reference

TOKENS = 16
DRAFTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("none", {}),
    "prompt_lookup": ("prompt_lookup", {"ngram": 2, "length": 5}),
    "suffix": ("suffix", {"nodes": 9, "min_share": 0.01}),
    "draft_model": ("draft_model", {"depth": 4}),
    "draft_tree": ("draft_model", {"depth": 3, "width": 3}),
    "draft_stop": ("draft_model", {"depth": 5, "width": 2, "stop": 0.2}),
    "draft_hardware": ("draft_model", {"tree": "hardware", "depth": 3, "width": 3}),
    "draft_paths": ("draft_model", {"paths": [[0], [1], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1]]}),
    "jacobi": ("jacobi", {"length": 4}),
    "lookahead": ("lookahead", {"window": 4, "ngram": 3, "guesses": 3}),
    "early_exit": ("early_exit", {"layers": 1, "depth": 3}),
    "early_tree": ("early_exit", {"layers": 1, "depth": 2, "width": 3}),
    "marginal": ("marginal", {"depth": 3, "most": 5}),
    "marginal_tree": ("marginal", {"depth": 2, "most": 9, "mass": 0.8, "width": 3}),
    "mtp": ("mtp", {"heads": 4}),
    "mtp_tree": ("mtp", {"heads": 3, "kind": "causal", "width": 3}),
    "blockwise": ("blockwise", {"heads": 4}),
    "medusa_tree": ("medusa", {"heads": 3, "paths": [[0], [1], [0, 0], [0, 1], [2], [0, 0, 0], [1, 0]]}),
    "weighted": ("weighted_heads", {"heads": 3, "width": 2}),
    "deepseek": ("deepseek_mtp", {"modules": 3, "guesses": 3, "width": 2}),
    "deepseek_shared": ("deepseek_mtp", {"attention": "shared", "vocabulary": 40, "tree": "dynamic", "nodes": 9}),
    "eagle_1": ("eagle", {"version": 1, "depth": 4, "nodes": 12}),
    "eagle_3": ("eagle", {"vocabulary": 50, "width": 1, "depth": 3}),
    "eagle_paths": ("eagle", {"norm_output": True, "paths": [[0], [1], [0, 0], [1, 0], [0, 0, 0], [0, 0, 1]]}),
    "hybrid_chain": ("hybrid", {"path": "draft_model", "copy": "prompt_lookup", "copies": 5}),
    "hybrid_tree": ("hybrid", {"path": "mtp_tree"}),
    "adaptive_lookup": ("prompt_lookup", {"adaptive": True}),
    "adaptive_lookahead": ("lookahead", {"adaptive": True, "window": 4, "ngram": 3, "guesses": 3}),
    "adaptive_jacobi": ("jacobi", {"adaptive": True, "length": 4}),
    "adaptive_draft": ("draft_model", {"adaptive": True, "depth": 4}),
    "adaptive_medusa": ("medusa", {"adaptive": True, "heads": 3, "paths": [[0], [1], [0, 0], [0, 0, 0], [1, 0]]}),
    "adaptive_deepseek": ("deepseek_mtp", {"adaptive": True, "modules": 3, "guesses": 3}),
    "adaptive_eagle": ("eagle", {"adaptive": True, "depth": 4, "nodes": 9}),
    "adaptive_hybrid": ("hybrid", {"adaptive": True, "path": "mtp_tree"}),
}
TRAINED = ("mtp", "blockwise", "medusa", "weighted_heads", "deepseek_mtp", "eagle")
"""Drafters with heads; here untrained ones with noise, which guess right now and then."""
ALIKE = (
    "draft_stop",
    "marginal",
    "draft_paths",
    "draft_hardware",
    "eagle_3",
    "eagle_paths",
    "hybrid_chain",
    "hybrid_tree",
)
ALIKE += tuple(key for key in DRAFTERS if key.startswith("adaptive_"))
"""Ask nothing of a family that others do not ask: every fourth family is enough."""
TEMPERATURES = (0.0, 0.7, 1.3)
DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Odd(LogitsProcessor):
    """Depends on the whole prefix: discourages tokens of the parity of the prefix's sum."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        parity = (torch.arange(scores.shape[-1]) + input_ids.sum(-1, keepdim=True)) % 2
        return scores - 2.0 * parity


PENALTIES = {
    "repetition_penalty": 1.3,
    "presence_penalty": 0.4,
    "frequency_penalty": 0.2,
    "logit_bias": {3: 1.5, 7: -2.0},
}
WARPERS = {"top_k": 12, "top_p": 0.9, "min_p": 0.02}


def prompts_of(target: Target) -> list[list[int]]:
    """Four prompts of different length, two of them repetitive so that look-ups find something."""
    draw = torch.Generator().manual_seed(5)
    words = torch.randint(3, target.vocab, (40,), generator=draw).tolist()
    return [words[:7] * 3, words[10:13], words[20:35], (words[5:9] * 5)[:18]]


@cache
def family(name: str, dtype: str) -> tuple[Target, Target]:
    """The tiny model of a family, and one of other weights that drafts for it."""
    return make(name, DTYPES[dtype]), make(name, DTYPES[dtype], seed=1)


class Script:
    """In place of a policy: these limits, again and again; where drafts are not deep at all, three steps of that."""

    def __init__(self, *limits: int) -> None:
        self.limits = cycle(limits)
        self.given: list[int] = []

    def rows(self, batch: int) -> Rows:
        return Rows.new(batch, Prior(1))

    def choose(self, feed: Feed, rows: Rows) -> int:
        self.given.append(min(next(self.limits), feed.budget - 1))
        rows.plain = 3
        return self.given[-1]

    def drafted(self, feed: Feed, rows: Rows, limit: int, height: int) -> None:
        pass


def drafter_for(key: str, target: Target, draft: Target) -> Any:
    """An adaptive one drafts by a script that switches at once, after a while, and deeper."""
    name, settings = DRAFTERS[key]
    settings = dict(settings)
    if settings.pop("adaptive", False):
        return Adaptive(made(name, settings, target, draft), Script(0, 2, 0, 0, 4, 1, 0, 0, 0, 3))
    return made(name, settings, target, draft)


def made(name: str, settings: dict[str, Any], target: Target, draft: Target) -> Any:
    if name in TRAINED:
        return with_heads(name, dict(settings), target)
    if name == "hybrid":
        settings = settings | {"path": drafter_for(settings["path"], target, draft)}
    if name == "draft_model":
        return with_model(dict(settings), target, draft)
    return make_drafter(name, target, settings)


def with_model(settings: dict[str, Any], target: Target, draft: Target) -> Any:
    """A draft model; what pays is decided by made-up times."""
    paths = settings.pop("paths", ())
    drafter: Any = make_drafter("draft_model", target, settings | {"path": draft})
    if paths:
        drafter.plan = Plan(Shape(3), {0.0: paths})
    if drafter.plan.worth:
        drafter.plan = replace(drafter.plan, worth=lambda feed: Worth(Costs((1, 64), (1.0, 5.0), 0.1)))
    return drafter


def with_heads(name: str, settings: dict[str, Any], target: Target) -> Any:
    """The drafter with heads of these settings; a family that can lend no layer gets others."""
    if target.config.model_type in ("gpt2", "gpt_bigcode", "opt"):
        settings |= {"kind": "linear"} if name == "mtp" else {}
        name, settings = ("eagle", {"width": 2}) if name == "deepseek_mtp" else (name, settings)
    module, paths = module_of(name), settings.pop("paths", ())
    shape = {field.name for field in fields(module.Architecture)}
    torch.manual_seed(7)
    heads = module.fresh(target, module.Architecture(**{k: v for k, v in settings.items() if k in shape}))
    for parameter in heads.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    drafter = module.build(target, module.Config(path=heads, **{k: v for k, v in settings.items() if k not in shape}))
    if paths:
        drafter.plan = Plan(Shape(3), {0.0: paths})
    return drafter


@cache
def expected(name: str, dtype: str, temperature: float) -> list[list[int]]:
    target, _ = family(name, dtype)
    return [
        reference(target.model, p, Sampling(temperature=temperature, seed=11), number=i, max_new_tokens=TOKENS)
        for i, p in enumerate(prompts_of(target))
    ]


def run(target: Target, drafter: Any, requests: list[Request], batch_size: int | None = None) -> list[Row]:
    return decode_all(target, drafter, requests, Match(), batch_size=batch_size)


def test_every_method_is_among_the_drafters():
    assert {name for name, _ in DRAFTERS.values()} == set(METHODS)


def mixed_requests(name: str, dtype: str) -> tuple[list[Request], list[list[int]]]:
    """At three temperatures: a plain request, one with penalties, one that ends inside a block, one cut short."""
    target, _ = family(name, dtype)
    requests: list[Request] = []
    want: list[list[int]] = []
    for temperature in TEMPERATURES:
        plain = expected(name, dtype, temperature)
        for i, prompt in enumerate(prompts_of(target)):
            request = Request(prompt, Sampling(temperature=temperature, seed=11), i, TOKENS)
            output = plain[i]
            if i == 1:
                request = replace(request, sampling=replace(request.sampling, **PENALTIES))
                output = reference(target.model, prompt, request.sampling, number=i, max_new_tokens=TOKENS)
            if i == 2:
                request = replace(request, eos=(output[9],))
                output = output[: output.index(output[9]) + 1]
            if i == 3:
                request = replace(request, max_new_tokens=7)
                output = output[:7]
            requests.append(request)
            want.append(output)
    return requests, want


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SUPPORTED)
def test_families(name: str, dtype: str):
    """Families x drafters, in a ragged batch of twelve different requests and alone."""
    target, draft = family(name, dtype)
    keys = [key for key in DRAFTERS if key not in ALIKE or SUPPORTED.index(name) % 4 == 0]
    assert_mixed_requests(name, dtype, target, draft, keys)


def assert_mixed_requests(name: str, dtype: str, target: Target, draft: Target, keys: Sequence[str]) -> None:
    requests, want = mixed_requests(name, dtype)
    for k, key in enumerate(keys):
        drafter = drafter_for(key, target, draft)
        assert [r.output for r in run(target, drafter, requests)] == want, key
        one = k % len(requests)
        assert run(target, drafter, [requests[one]])[0].output == want[one], (key, one)


@pytest.mark.parametrize("key", DRAFTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_penalties_warpers_and_processors(key: str, dtype: str):
    """Settings that depend on the prefix, different in every row of one batch."""
    assert_prefix_settings(key, *family("llama", dtype))


def assert_prefix_settings(key: str, target: Target, draft: Target) -> None:
    settings = [
        Sampling(temperature=0.0, seed=3, **PENALTIES),
        Sampling(temperature=0.9, seed=4, processors=(Odd(),), **PENALTIES),
        Sampling(temperature=1.3, seed=5, **WARPERS),
        Sampling(temperature=0.7, seed=6, processors=(Odd(),), **(PENALTIES | WARPERS)),
    ]
    prompts = prompts_of(target)
    want = [
        reference(target.model, p, s, number=9, max_new_tokens=TOKENS) for p, s in zip(prompts, settings, strict=True)
    ]
    requests = [Request(p, s, 9, TOKENS) for p, s in zip(prompts, settings, strict=True)]
    rows = run(target, drafter_for(key, target, draft), requests)
    assert [r.output for r in rows] == want


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("key", DRAFTERS)
def test_end_tokens_and_lengths(key: str, temperature: float):
    """An end token anywhere in a block, and every length, cut the same output at the same place."""
    assert_ends(key, temperature, *family("llama", "float64"))


def assert_ends(key: str, temperature: float, target: Target, draft: Target) -> None:
    """Of the family "llama" in float64."""
    want = expected("llama", "float64", temperature)
    drafter = drafter_for(key, target, draft)
    sampling = Sampling(temperature=temperature, seed=11)
    for place in (0, 1, 2, 5, 9, 14):
        ends = [w[place] for w in want]
        requests = [
            Request(p, sampling, i, TOKENS, eos=(e,))
            for i, (p, e) in enumerate(zip(prompts_of(target), ends, strict=True))
        ]
        for row, output, end in zip(run(target, drafter, requests), want, ends, strict=True):
            assert row.output == output[: output.index(end) + 1]
            assert row.finish == "eos"
    for length in (1, 2, 3, 7):
        requests = [Request(p, sampling, i, length + i) for i, p in enumerate(prompts_of(target))]
        for i, row in enumerate(run(target, drafter, requests)):
            assert row.output == want[i][: length + i]
            assert row.finish == "length"


@pytest.mark.parametrize("key", DRAFTERS)
def test_rows_join_and_leave(key: str):
    """Eight requests of different lengths through two places: neighbours and order change nothing."""
    assert_neighbours(key, *family("mistral", "float64"))


def assert_neighbours(key: str, target: Target, draft: Target) -> None:
    prompts = prompts_of(target)
    sampling = Sampling(temperature=0.8, seed=2)
    requests = [Request(prompts[i % 4], sampling, i, 3 + 4 * ((5 * i) % 7)) for i in range(8)]
    rows = run(target, drafter_for(key, target, draft), requests, batch_size=2)
    for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
        alone = reference(target.model, request.tokens, sampling, number=i, max_new_tokens=request.max_new_tokens)
        assert row.output == alone, i


@pytest.mark.parametrize("key", DRAFTERS)
def test_the_context_ends_the_output(key: str):
    """At the end of the context drafts still fit, and the output stops where the context does."""
    assert_context(key, *family("opt", "float64"))  # learned positions: a node past the end would have none


def assert_context(key: str, target: Target, draft: Target) -> None:
    assert target.context is not None
    prompt = (prompts_of(target)[0] * 40)[: target.context - 6]
    rows = run(
        target,
        drafter_for(key, target, draft),
        [Request(prompt, Sampling(), 0, 50), Request(prompt[:-3], max_new_tokens=50)],
    )
    assert rows[0].output == reference(target.model, prompt, Sampling(), max_new_tokens=6)
    assert [len(r.output) for r in rows] == [6, 9]
    assert [r.finish for r in rows] == ["length", "length"]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("key", DRAFTERS)
def test_real_models(key: str, temperature: float):
    """A model that writes stories, and another one that drafts for it."""
    target, draft = asset(BITSTORIES, torch.float32), asset(STORIES, torch.float32)
    prompts = ["Once upon a time", "The little dog ran to the"]
    drafter = drafter_for(key, target, draft)
    outputs = foretoken.generate(
        target, prompts, drafter=drafter, temperature=temperature, seed=7, max_new_tokens=48, top_p=0.95
    )
    assert target.tokenizer is not None
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        sampling = Sampling(temperature=temperature, seed=7, top_p=0.95)
        ids = target.tokenizer(prompt)["input_ids"]
        assert output.token_ids == reference(target.model, ids, sampling, number=i, max_new_tokens=48)


def test_a_wrong_reference_is_noticed():
    """Another seed, another number or another temperature is another sample: equality is not vacuous."""
    target, _ = family("llama", "float64")
    prompt = prompts_of(target)[0]
    sampling = Sampling(temperature=1.0, seed=1)
    base = reference(target.model, prompt, sampling, max_new_tokens=TOKENS)
    others = [
        reference(target.model, prompt, replace(sampling, seed=2), max_new_tokens=TOKENS),
        reference(target.model, prompt, sampling, number=1, max_new_tokens=TOKENS),
        reference(target.model, prompt, replace(sampling, temperature=0.0), max_new_tokens=TOKENS),
    ]
    assert all(base != other for other in others)


def test_guesses_are_accepted():
    """Equality of outputs says nothing if no guess ever survives: a draft model equal to the target is always right."""
    target, _ = family("llama", "float64")
    for temperature in TEMPERATURES:
        drafter = make_drafter("draft_model", target, {"path": target, "depth": 4})
        sampling = Sampling(temperature=temperature, seed=11)
        session = Session(target, drafter, [Request(p, sampling, i, 21) for i, p in enumerate(prompts_of(target))])
        while session.running:
            session.step()
        assert [row.forwards for row in session.rows] == [4, 4, 4, 4]
        assert all(row.accepted == [4, 4, 4, 4] for row in session.rows)
