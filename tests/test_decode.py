"""What a drafter is told: the feed after every step, against cache-free forwards."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from foretoken.decode import Request, Session
from foretoken.drafter import Feed, Needs, Stateless
from foretoken.sampling import Sampling
from foretoken.target import Target
from foretoken.tree import Draft, chain, tree


def small() -> Target:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=19,
        max_position_embeddings=128,
        initializer_range=0.4,
    )
    return Target(LlamaForCausalLM(config).double())


@dataclass
class Spy:
    """Guesses a bushy random tree, with one probe, and keeps what it was fed."""

    features: tuple[int, ...] = (1, -1)
    fed: list[Feed] = field(default_factory=list)

    @property
    def needs(self) -> Needs:
        return Needs(width=24, features=self.features)

    def start(self, batch: int, capacity: int) -> Stateless:
        return Stateless()

    def propose(self, feed: Feed, state: Stateless) -> Draft:
        self.fed.append(feed)
        draw = torch.Generator().manual_seed(len(self.fed))
        guesses = torch.stack([torch.randperm(19, generator=draw) for _ in range(feed.batch)])
        parent = torch.tensor([-1] + [0] * 14 + [1, 2, 3, 4, 15, 16, 17, -1, 22])
        more = torch.randint(19, (feed.batch, 9), generator=draw)
        tokens = torch.cat([feed.root[:, None], guesses[:, :14], more], 1)
        return tree(tokens, parent.expand(feed.batch, -1).contiguous())


PROMPTS = [[3, 4, 5, 6, 7], [8, 9], [1, 2, 3, 4, 5, 6, 7, 8, 9]]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_feed(temperature: float):
    """Committed tokens with their features, the root, and what the target said where the root was emitted."""
    target, spy = small(), Spy()
    sampling = Sampling(temperature=temperature)
    session = Session(target, spy, [Request(p, sampling, i, 30) for i, p in enumerate(PROMPTS)])
    committed: list[list[int]] = [[] for _ in PROMPTS]
    while session.running:
        session.step()
    guessed = 0
    for feed in spy.fed:
        for b, history in enumerate(committed):
            new = feed.tokens[b, : feed.count[b]].tolist()
            whole = target.model(input_ids=torch.tensor([history + new]), output_hidden_states=True).hidden_states
            want = torch.cat([whole[i] for i in spy.features], -1)[0, len(history) :]
            assert feed.features is not None
            torch.testing.assert_close(feed.features[b, : feed.count[b]], want, rtol=1e-9, atol=1e-9)
            history += new
            text = session.rows[b].text
            assert history == text[: len(history)]
            assert feed.length[b] == len(history)
            if feed.count[b]:
                assert feed.root[b] == text[len(history)]
                assert feed.emitted[b, feed.last[b]] == feed.root[b]
                guessed += feed.count[b] - 1 if len(history) > len(PROMPTS[b]) else 0
    assert guessed > 20  # paths other than the first child were committed


def test_feeds_of_joined_sessions():
    """Rows that join bring their prompt; rows that were there bring their last step."""
    target, spy = small(), Spy(features=(-1,))
    first = Session(target, spy, [Request(PROMPTS[0], max_new_tokens=20)], capacity=128)
    first.step()
    before = first.feed()
    first.join(Session(target, spy, [Request(PROMPTS[2], number=2, max_new_tokens=20)], capacity=128))
    both = first.feed()
    assert both.count == [*before.count, len(PROMPTS[2])]
    assert both.tokens[1].tolist() == PROMPTS[2]
    assert both.tokens[0, : before.count[0]].tolist() == before.tokens[0, : before.count[0]].tolist()
    assert both.features is not None
    want = target.model(input_ids=torch.tensor([PROMPTS[2]]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(both.features[1:], want, rtol=1e-9, atol=1e-9)
    first.select([1])
    assert first.feed().tokens[0, : first.feed().count[0]].tolist() == PROMPTS[2]


def test_long_prompts_are_read_in_chunks(monkeypatch: pytest.MonkeyPatch):
    """A prompt of many chunks, beside a short one, gives the logits and features of one ordinary forward."""
    monkeypatch.setattr("foretoken.target.CHUNK", 16)
    target = small()
    tokens = torch.randint(19, (2, 75), generator=torch.Generator().manual_seed(1))
    cache = target.cache(2, 128)
    read = target.read(tokens, [75, 21], cache, features=[2])
    whole = target.model(input_ids=tokens, output_hidden_states=True)
    torch.testing.assert_close(read.logits[0, 0], whole.logits[0, 74], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(read.logits[1, 0], whole.logits[1, 20], rtol=1e-9, atol=1e-9)
    assert read.features is not None
    torch.testing.assert_close(read.features[0], whole.hidden_states[2][0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(read.features[1, :21], whole.hidden_states[2][1, :21], rtol=1e-9, atol=1e-9)
    assert cache.lengths == [75, 21]


def test_lookahead_mask_is_the_rule():
    """Every row of the draft's mask against the rule of the paper, entry by entry (level, column), and the example."""
    from foretoken.drafters.lookahead import Config, Lookahead

    def rule(W: int, N: int, G: int) -> torch.Tensor:
        rows = [("window", level, i) for level in range(N - 1) for i in range(W)]
        rows += [("guess", g, j) for g in range(G) for j in range(N - 1)]

        def sees(a: tuple[str, int, int], b: tuple[str, int, int]) -> bool:
            if a[0] == "window":
                _, level, i = a
                return b[0] == "window" and ((b[1] == 0 and b[2] <= i) or (1 <= b[1] <= level and b[2] == i))
            return b == ("window", 0, 0) or (b[0] == "guess" and b[1] == a[1] and b[2] <= a[2])

        return torch.tensor([[sees(a, b) for b in rows] for a in rows])

    for W in (1, 2, 5, 7):
        for N in (2, 3, 4, 5):
            for G in (0, 1, 3):
                made = Lookahead(Config(W, N, G), torch.device("cpu"))
                assert torch.equal(made.ancestors, rule(W, N, G)), (W, N, G)
                assert made.needs.width == (W + G) * (N - 1)
    example = Lookahead(Config(3, 3, 1), torch.device("cpu"))
    assert (example.ancestors.sum(-1) - 1 + 10).tolist() == [10, 11, 12, 11, 12, 13, 11, 12]


def test_lookahead_reads_its_pool_and_slides():
    """On a target that counts, the window becomes right and the pool offers what follows."""
    from foretoken.drafters.lookahead import Config, Lookahead

    lookahead = Lookahead(Config(3, 3, 2, prompt_pool=False), torch.device("cpu"))
    state = lookahead.start(1, 64)
    state.window[0] = torch.tensor([[10, 11, 12], [11, 12, 13]])
    state.age = [2]
    emitted = torch.zeros(1, 10, dtype=torch.int64)
    emitted[0, 3:6] = torch.tensor([12, 13, 14])  # what a counting target says at the last level
    root = torch.tensor([11])
    base = Session(small(), Spy(), [Request([10])]).feed()
    feed = Feed(
        tokens=base.tokens, count=[1], features=None, root=root, length=base.length, texts=[[10, 11]], budget=9,
        sampler=base.sampler, samples=False, emitted=emitted, last=torch.tensor([0]), cache=base.cache,
    )  # fmt: skip
    draft = lookahead.propose(feed, state)
    assert state.window[0].tolist() == [[11, 12, 13], [12, 13, 14]]
    assert state.pools[0].behind(11) == [(12, 13)]
    assert draft.tokens[0].tolist() == [11, 12, 13, 12, 13, 14, 12, 13, 11, 11]
    assert draft.parent[0].tolist() == [-1, 0, 1, 0, 1, 2, 0, 6, -1, -1]


def test_jacobi_shifts_by_what_was_accepted():
    """The guesses are what the target said behind the last accepted node, then the root again."""
    from foretoken.drafters.jacobi import Config, Jacobi

    jacobi = Jacobi(Config(4))
    base = Session(small(), Spy(), [Request([10])]).feed()
    feed = Feed(
        tokens=base.tokens, count=[1], features=None, root=torch.tensor([5]), length=base.length, texts=[[10, 5]],
        budget=9, sampler=base.sampler, samples=False, emitted=torch.tensor([[4, 5, 6, 7, 8]]),
        last=torch.tensor([1]), cache=base.cache,
    )  # fmt: skip
    state = jacobi.start(1, 64)
    assert jacobi.propose(feed, state).tokens[0].tolist() == [5, 5, 5, 5, 5]
    assert jacobi.propose(feed, state).tokens[0].tolist() == [5, 6, 7, 8, 5]


def test_chain_counts_what_can_be_accepted():
    draft = chain(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([3, 1]))
    assert draft.parent.tolist() == [[-1, 0, 1], [-1, -1, -1]]
