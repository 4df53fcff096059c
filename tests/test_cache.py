"""The slot cache: after any commits it holds what a fresh prefill of those tokens would, and nodes see their path.

Everything in float64, so that a wrong key or a wrong mask is ten orders of magnitude above the rounding.
"""

import gc
from functools import lru_cache
from types import SimpleNamespace
from weakref import ref

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from foretoken.cache import BUCKET, SlotCache
from foretoken.decode import Request, capacity_for
from foretoken.drafter import Needs
from foretoken.errors import UserError
from foretoken.target import Target
from foretoken.tree import Draft, chain, closure, path_to, tree

settings.load_profile("ci")  # the same examples every time, and no deadline on a busy machine

CPU = torch.device("cpu")
VOCAB, WINDOW, RESERVE = 40, 12, 8
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


@lru_cache
def target(kind: str) -> Target:
    """A tiny random model whose layers attend to everything, to a window, or alternate."""
    torch.manual_seed(0)
    if kind == "full":
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **COMMON))
    elif kind == "sliding":
        model = MistralForCausalLM(MistralConfig(num_hidden_layers=2, sliding_window=WINDOW, **COMMON))
    else:
        layers = ["sliding_attention", "full_attention", "sliding_attention"]
        model = Qwen2ForCausalLM(
            Qwen2Config(
                num_hidden_layers=3, layer_types=layers, use_sliding_window=True, sliding_window=WINDOW, **COMMON
            )
        )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # far from the almost uniform attention of a fresh model
    return Target(model.double())


KINDS = ["full", "sliding", "mixed"]


def small_cache(kind: str, batch: int, capacity: int = 192) -> SlotCache:
    """Rings of WINDOW - 1 + RESERVE slots, which wrap after every other draft."""
    return SlotCache(batch, capacity, target(kind).windows, RESERVE, CPU)


@torch.no_grad()
def prefill(kind: str, text: list[int]) -> DynamicCache:
    cache = DynamicCache()  # without a configuration: all layers keep all
    target(kind).model(input_ids=torch.tensor([text]), past_key_values=cache, use_cache=True)
    return cache


@torch.no_grad()
def plain_logits(kind: str, text: list[int]) -> Tensor:
    return target(kind).model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]


def check_contents(kind: str, cache: SlotCache, texts: list[list[int]]) -> None:
    """Every committed key and value that a later token may see is where it belongs."""
    assert cache.lengths == cache.length.tolist() == [len(t) for t in texts]
    for b, text in enumerate(texts):
        if text:
            fresh = prefill(kind, text)
            for layer, expected in zip(cache.slots, fresh.layers, strict=True):
                first = 0 if layer.window is None else max(0, len(text) - layer.window + 1)
                slots = torch.arange(first, len(text)) % layer.size
                for store, true in ((layer.keys, expected.keys), (layer.values, expected.values)):
                    torch.testing.assert_close(layer.rows(store)[b][:, slots], true[0, :, first:], rtol=0, atol=1e-10)


def random_draft(generator: torch.Generator, batch: int, nodes: int, chained: bool) -> Draft:
    tokens = torch.randint(0, VOCAB, (batch, nodes), generator=generator)
    if chained:
        return chain(tokens)
    parent = [torch.randint(-1, n, (batch,), generator=generator) for n in range(1, nodes)]
    return tree(tokens, torch.stack([torch.full((batch,), -1), *parent], 1))


def accept(generator: torch.Generator, draft: Draft) -> tuple[Tensor, list[int]]:
    """A random path of each row; some rows commit nothing, as finished ones do."""
    B, N = draft.tokens.shape
    path, count = path_to(draft, torch.randint(0, N, (B,), generator=generator))
    idle = torch.rand(B, generator=generator) < 0.15
    count = torch.where(idle | (path[:, 0] != 0), 0, count)  # a path that starts at a probe is none
    return path, count.tolist()


@torch.no_grad()
def step(kind: str, cache: SlotCache, texts: list[list[int]], draft: Draft, generator, check: bool) -> None:
    """Judge a draft, compare every node with plain decoding of its path, commit a random path."""
    logits = target(kind).judge(draft, cache).logits
    if check:
        for b, text in enumerate(texts):
            for n in range(draft.width):
                on_path = draft.tokens[b, draft.ancestors[b, n]].tolist()
                if draft.parent[b, n] >= 0 or n == 0:
                    if int(path_to(draft, torch.full((len(texts),), n))[0][b, 0]) != 0:
                        continue  # below a probe
                    torch.testing.assert_close(logits[b, n], plain_logits(kind, text + on_path), rtol=0, atol=1e-10)
    path, count = accept(generator, draft)
    cache.commit(None if draft.chained else path[:, : max(1, *count)], count)
    for b, text in enumerate(texts):
        text += draft.tokens[b, path[b, : count[b]]].tolist()


@pytest.mark.parametrize("chained", [True, False], ids=["chains", "trees"])
@pytest.mark.parametrize("kind", KINDS)
def test_after_every_commit_the_cache_is_that_of_a_fresh_prefill(kind, chained):
    """Rows grow unevenly through several turns of the ring; drafts of every width up to the reserve."""
    generator = torch.Generator().manual_seed(1)
    B = 3
    cache, texts = small_cache(kind, B), [[] for _ in range(B)]
    for i in range(60):
        draft = random_draft(generator, B, 1 + i % RESERVE, chained)
        step(kind, cache, texts, draft, generator, check=i % 6 == 5)
        if i % 6 == 5:
            check_contents(kind, cache, texts)
    assert min(cache.lengths) > 2 * (WINDOW - 1 + RESERVE)  # the ring has wrapped in every row
    assert len(set(cache.lengths)) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_rows_leave_swap_and_join_with_their_keys(kind):
    generator = torch.Generator().manual_seed(2)
    cache, texts = small_cache(kind, 3), [[] for _ in range(3)]
    other, more = small_cache(kind, 2), [[] for _ in range(2)]
    for i in range(14):
        step(kind, cache, texts, random_draft(generator, 3, 5, False), generator, check=False)
        if i % 2:
            step(kind, other, more, random_draft(generator, 2, 4, False), generator, check=False)
    cache.select([2, 0])
    texts = [texts[2], texts[0]]
    check_contents(kind, cache, texts)
    cache.join(other)
    texts += more
    check_contents(kind, cache, texts)
    cache.select([3, 1, 2])
    texts = [texts[3], texts[1], texts[2]]
    for _ in range(6):
        step(kind, cache, texts, random_draft(generator, 3, 6, False), generator, check=True)
    check_contents(kind, cache, texts)


@pytest.mark.parametrize("empty_first", [True, False])
def test_rows_that_have_read_nothing_yet_join_and_are_joined(empty_first):
    generator = torch.Generator().manual_seed(7)
    caches = small_cache("mixed", 1), small_cache("mixed", 2)
    texts = [[]], [[], []]
    for _ in range(8):
        draft = random_draft(generator, 1 + empty_first, 5, False)
        step("mixed", caches[empty_first], texts[empty_first], draft, generator, check=False)
    caches[0].join(caches[1])
    check_contents("mixed", caches[0], [*texts[0], *texts[1]])
    together = [*texts[0], *texts[1]]
    for _ in range(5):
        step("mixed", caches[0], together, random_draft(generator, 3, 5, False), generator, check=True)
    check_contents("mixed", caches[0], together)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_length_are_read_in_chunks_and_stay_apart(kind, monkeypatch):
    """The engine's own prefill: rows that ended earlier keep what they have."""
    monkeypatch.setattr("foretoken.target.CHUNK", 64)
    model = target(kind)
    texts = [
        torch.randint(0, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 150, 64, 97)
    ]
    padded = torch.tensor([t + [0] * (150 - len(t)) for t in texts])
    cache = SlotCache(4, 192, model.windows, 64, CPU)
    with torch.no_grad():
        read = model.read(padded, [len(t) for t in texts], cache)
    check_contents(kind, cache, texts)
    for b, text in enumerate(texts):
        torch.testing.assert_close(read.logits[b, 0], plain_logits(kind, text), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_forgotten_tokens_leave_no_trace(kind):
    """Rewinding as a draft model does: read some tokens and the root, look ahead, forget the root."""
    generator = torch.Generator().manual_seed(3)
    cache, texts = small_cache(kind, 2), [[], []]
    for _ in range(12):
        step(kind, cache, texts, random_draft(generator, 2, 4, True), generator, check=False)
        extra = random_draft(generator, 2, 3, True)
        target(kind).judge(extra, cache)
        cache.commit(None, [1, 1])
        ahead = random_draft(generator, 2, 4, False)
        target(kind).extend(ahead.tokens, ahead.depth, ahead.ancestors, cache)
        cache.rewind(1)
    check_contents(kind, cache, texts)
    step(kind, cache, texts, random_draft(generator, 2, 6, False), generator, check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_read_level_by_level_is_the_tree_read_at_once(kind):
    """Growing: later nodes find earlier ones in the cache, at their offset."""
    generator = torch.Generator().manual_seed(4)
    cache, texts = small_cache(kind, 2), [[], []]
    for _ in range(14):
        step(kind, cache, texts, random_draft(generator, 2, 5, False), generator, check=False)
    draft = random_draft(generator, 2, 7, False)
    model = target(kind)
    with torch.no_grad():
        whole = model.judge(draft, cache).logits
        parts = []
        for start, end in ((0, 1), (1, 4), (4, 7)):
            seen = draft.ancestors[:, start:end, :end]
            part = model.extend(draft.tokens[:, start:end], draft.depth[:, start:end], seen, cache, offset=start)
            parts.append(part.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-10)


def test_the_first_layers_share_their_stores_and_are_written_again_in_full():
    generator = torch.Generator().manual_seed(5)
    model, kind = target("mixed"), "mixed"
    cache, texts = small_cache(kind, 2), [[], []]
    for _ in range(10):
        step(kind, cache, texts, random_draft(generator, 2, 5, False), generator, check=False)
    view, part = cache.first(2), model.shallow(2)
    assert view.slots[1].keys is cache.slots[1].keys
    draft = random_draft(generator, 2, 6, False)
    with torch.no_grad():
        ahead = part.judge(draft, view).logits
        for b, text in enumerate(texts):
            expected = part.model(input_ids=torch.tensor([[*text, int(draft.tokens[b, 0])]]), use_cache=False).logits
            torch.testing.assert_close(ahead[b, 0], expected[0, -1], rtol=0, atol=1e-10)
    check_contents(kind, cache, texts)
    step(kind, cache, texts, draft, generator, check=True)
    check_contents(kind, cache, texts)


# ----------------------------------------------------------------------------------------------------------------- mask


@st.composite
def situations(draw):
    window = draw(st.sampled_from([None, 2, 5, 8, 16]))
    offset, n = draw(st.integers(0, 4)), draw(st.integers(1, 6))
    M = offset + n
    parent = [[-1] + [draw(st.integers(-1, i - 1)) for i in range(1, M)] for _ in range(2)]
    lengths = [draw(st.integers(0, 90)) for _ in range(2)]
    reserve = M + draw(st.integers(0, 3))
    counts = draw(st.none() | st.lists(st.integers(0, n), min_size=2, max_size=2))
    return window, offset, n, parent, lengths, reserve, counts


@settings(max_examples=150)
@given(situations())
def test_nodes_see_committed_slots_and_ancestors_within_the_window(situation):
    """Slot by slot: what lies there after writing everything in order, and whether the node may look at it."""
    window, offset, n, parent, lengths, reserve, counts = situation
    cache = SlotCache(2, 112, [window], reserve, CPU)
    cache.resize(lengths)
    ancestors = closure(torch.tensor(parent))
    depth = (ancestors.sum(-1) - 1)[:, offset:]
    masks = cache.plan(depth, ancestors[:, offset:], offset, torch.float64, counts)
    layer = cache.slots[0]
    assert masks[window].shape == (2, 1, n, layer.visible)
    assert layer.visible == layer.size or layer.visible % BUCKET == 0
    for b, length in enumerate(lengths):
        holds: dict[int, tuple[str, int]] = {p % layer.size: ("token", p) for p in range(length)}
        count = n if counts is None else counts[b]
        holds |= {(length + i) % layer.size: ("node", i) for i in range(offset + count)}  # the rest is padding
        for i in range(count):
            node = offset + i
            position = length + int(depth[b, i])
            seen = set()
            for slot, (what, which) in holds.items():
                if what == "token":
                    visible, at = True, which
                else:
                    visible, at = bool(ancestors[b, node, which]), length + int(ancestors[b, which].sum()) - 1
                if visible and (window is None or position - at < window):
                    seen.add(slot)
            assert {s for s in range(layer.visible) if masks[window][b, 0, i, s] == 0} == seen
        spare, position = 2 * 3 * layer.size, length + offset
        rows = [
            (b * 3 + h) * layer.size + (position + i) % layer.size if i < count else spare
            for h in range(3)
            for i in range(n)
        ]
        assert layer.write.flat(3).view(2, 3 * n)[b].tolist() == rows


def test_nodes_that_are_not_kept_go_to_the_spare_slot():
    cache = SlotCache(2, 20, [None, 5], 4, CPU)
    depth = torch.arange(3).expand(2, 3)
    cache.plan(depth, None, 0, torch.float64, [2, 0])
    assert cache.slots[0].write.flat(1).tolist() == [0, 1, 40, 40, 40, 40]
    assert cache.slots[1].write.flat(2).tolist() == [0, 1, 32, 8, 9, 32, *[32] * 6]


# ---------------------------------------------------------------------------------------------------- size and refusals


@torch.no_grad()
def test_a_full_cache_is_used_to_its_last_slot_and_then_refuses():
    generator = torch.Generator().manual_seed(6)
    cache, texts = small_cache("full", 1, capacity=20), [[]]
    for nodes in (8, 8, 4):
        draft = random_draft(generator, 1, nodes, True)
        target("full").judge(draft, cache)
        cache.commit(None, [nodes])
        texts[0] += draft.tokens[0].tolist()
    check_contents("full", cache, texts)
    with pytest.raises(UserError, match="holds 20 tokens and 21 are needed"):
        target("full").judge(random_draft(generator, 1, 1, True), cache)


def static_bytes(model: Target, batch: int, tokens: int) -> int:
    cache = StaticCache(config=model.config, max_cache_len=tokens)
    head = model.config.hidden_size // model.config.num_attention_heads
    cache.early_initialization(batch, model.config.num_key_value_heads, head, torch.float64, CPU)
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))


@pytest.mark.parametrize("windows", [None, [1024, None]], ids=["full", "sliding"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("tokens", [512, 2048])
@torch.no_grad()
def test_the_cache_is_little_larger_than_transformers_static_one(tokens, batch, windows):
    """Room for a draft of 8 nodes behind the last token included; measured after a forward has made the stores."""
    torch.manual_seed(0)
    if windows is None:
        model = Target(LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **COMMON)).double())
    else:
        layers = ["sliding_attention", "full_attention"]
        config = Qwen2Config(
            num_hidden_layers=2, layer_types=layers, use_sliding_window=True, sliding_window=1024, **COMMON
        )
        model = Target(Qwen2ForCausalLM(config).double())
    drafter = SimpleNamespace(needs=Needs(width=8))
    capacity = capacity_for(model, drafter, [Request([0] * (tokens - 40), max_new_tokens=40)])
    cache = model.cache(batch, capacity, 8)
    model.judge(chain(torch.zeros(batch, 8, dtype=torch.int64)), cache)
    assert static_bytes(model, batch, tokens) < cache.nbytes <= 1.1 * static_bytes(model, batch, tokens)


def test_a_cache_that_does_not_fit_is_refused_before_it_is_made(monkeypatch):
    cache = small_cache("full", 2)
    slots, heads, head, layers = 192, 2, 8, 2
    needed = 2 * layers * 2 * heads * slots * head * 8  # keys and values, batch of 2, float64
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=needed - 1))
    with pytest.raises(UserError, match="A batch of 2 rows of 192 tokens needs"):
        target("full").judge(chain(torch.zeros(2, 1, dtype=torch.int64)), cache)
    assert cache.nbytes == 0
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=needed))
    with torch.no_grad():
        target("full").judge(chain(torch.zeros(2, 1, dtype=torch.int64)), cache)
    assert cache.nbytes == needed + 2 * layers * head * 8  # and the spare row of every store


def test_a_cache_is_gone_with_its_last_holder():
    """Without waiting for the collector of cycles: what one session held is there for the next."""
    gc.collect()
    gc.disable()
    try:
        cache = small_cache("full", 2)
        target("full").judge(chain(torch.zeros(2, 1, dtype=torch.int64)), cache)
        gone = ref(cache)
        del cache
        assert gone() is None
    finally:
        gc.enable()
