"""Whether a loaded model reads trees: the engine's forwards beside plain ones without a cache, on random tokens.

Three rows of different length are read in small pieces, a branching draft is judged behind each, a path that is not the
first one is committed, and a second draft is judged behind that. Every node's logits are compared with those of one
ordinary `model(input_ids)` over that row's prompt and the node's path alone: no cache, no mask, no batch.
"""

from dataclasses import asdict, dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from foretoken.cache import BUCKET, SlotCache
from foretoken.errors import UserError
from foretoken.target import Target
from foretoken.tree import Draft, path_to, stack

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 64 * 2.0**-10, torch.bfloat16: 32 * 2.0**-7}
"""Largest difference of a logit, in units of the logits' spread, that rounding may cause.

A float64 model of plain float64 arithmetic stays below 1e-13. But transformers computes norms, routers, rotary tables
and the eager softmax in float32 whatever the dtype; there a difference in the last bit can become one of 1e-7.
"""

LONG_WINDOW = 512
"""A prompt longer than a sliding window up to this length is cheap enough to be tried."""

PIECE = 16
"""Prompt tokens per forward where reading in pieces is tried."""

MORE = 8
"""Tokens that transformers' own cached decoding reads for comparison."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of the engine measured: `nodes` compared, of which `beyond` differ by more than the tolerance.

    difference  the largest difference of a logit over the spread (standard deviation over the vocabulary) of the logits
    same_top    nodes whose most likely token is the same
    """

    nodes: int
    beyond: int
    difference: float
    same_top: int

    @property
    def agrees(self) -> bool:
        return self.beyond == 0


@dataclass(frozen=True, slots=True)
class Report:
    """What `check` found.

    windows    per layer, the length of its sliding window, None for full attention
    attention  transformers' name of the attention implementation
    longest    tokens of the longest prompt tried
    tolerance  largest difference that counts as rounding, and `tolerance_eps`, the same in units of the dtype's eps
    ordinary   the difference that transformers' own cached decoding has from forwards without a cache, for comparison
    parts      "tree", "ragged batch", "commit", "prefill": what each measured; those not reached are absent
    verdict    "trees", "refused: ...", "wrong: ..." or "unclear: ..."
    """

    model_type: str
    model_class: str
    dtype: str
    attention: str
    windows: list[int | None]
    longest: int
    tolerance: float
    tolerance_eps: float
    ordinary: float | None
    parts: dict[str, Part]
    verdict: str

    @property
    def ok(self) -> bool:
        return self.verdict == "trees"

    @property
    def difference(self) -> float:
        """The largest difference of all parts; nan if any is nan."""
        found = torch.tensor([part.difference for part in self.parts.values()], dtype=torch.float64)
        return float(found.max()) if len(found) else float("nan")


@dataclass(frozen=True, slots=True)
class Prompts:
    """Random prompts, as lists and as `tokens` [B, T] padded behind."""

    rows: list[list[int]]
    tokens: Tensor

    @property
    def count(self) -> list[int]:
        return [len(row) for row in self.rows]


def check(target: Target, *, nodes: int = 10, seed: int = 0) -> Report:
    """The report of `target`, on random prompts and trees of `nodes` nodes (5 or more) drawn from `seed`."""
    parts: dict[str, Part] = {}
    ordinary, longest, tolerance = None, 0, TOLERANCE[target.dtype]
    try:
        with torch.inference_mode():
            chance = Random(seed)
            prompts = random_prompts(target, nodes, chance)
            longest = max(prompts.count)
            single = Prompts([prompts.rows[0]], prompts.tokens[:1])
            ordinary = ordinary_difference(target, prompts.rows[0], chance)
            draft = random_draft(target, 1, nodes, chance)
            parts["tree"] = judged(target, filled(target, single, nodes), single.rows, draft, tolerance)
            cache, draft = filled(target, prompts, nodes), random_draft(target, len(prompts.rows), nodes, chance)
            parts["ragged batch"] = judged(target, cache, prompts.rows, draft, tolerance)
            texts = committed(cache, draft, prompts.rows)
            draft = random_draft(target, len(prompts.rows), nodes, chance)
            parts["commit"] = judged(target, cache, texts, draft, tolerance)
            parts["prefill"] = pieces(target, prompts, nodes, tolerance)
        verdict = verdict_of(parts, target)
    except UserError as error:
        verdict = f"refused: {error}"
    except Exception as error:  # any failure of a model that nobody has tried is a finding, not a crash
        verdict = f"wrong: the forward failed with {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return Report(
        model_type=target.config.model_type,
        model_class=type(target.model).__name__,
        dtype=str(target.dtype).removeprefix("torch."),
        attention=str(target.model.config._attn_implementation),  # pyright: ignore[reportPrivateUsage]
        windows=target.windows,
        longest=longest,
        tolerance=tolerance,
        tolerance_eps=tolerance / torch.finfo(target.dtype).eps,
        ordinary=ordinary,
        parts=parts,
        verdict=verdict,
    )


def random_prompts(target: Target, nodes: int, chance: Random) -> Prompts:
    """Three prompts: one that fills some buckets of slots and goes round a sliding layer's ring, two shorter ones."""
    windows = [w for w in target.windows if w is not None]
    longest = 4 * BUCKET + 7
    if windows and max(windows) <= LONG_WINDOW:
        longest = max(windows) + target.chunk + 11
    if target.context is not None:
        longest = min(longest, target.context - 2 * (nodes + MORE))
    if longest < 4:
        needed = 2 * (nodes + MORE) + 4
        raise UserError(f"The model's context is {target.context} tokens; checking it needs {needed} or more.")
    rows = [random_tokens(target, n, chance) for n in (longest, -(-longest * 2 // 3), min(5, longest))]
    tokens = torch.tensor([row + row[-1:] * (longest - len(row)) for row in rows], device=target.device)
    return Prompts(rows, tokens)


def random_tokens(target: Target, count: int, chance: Random) -> list[int]:
    """`count` tokens, none of them the padding token, about which transformers would warn."""
    padding = getattr(target.config, "pad_token_id", None)
    start = padding + 1 if isinstance(padding, int) else 0
    return [(start + chance.randrange(target.vocab - 1)) % target.vocab for _ in range(count)]


def random_draft(target: Target, rows: int, nodes: int, chance: Random) -> Draft:
    """A draft of `nodes` nodes for each of `rows` rows: siblings, a chain that is not the first path, more."""
    start = [-1, 0, 0, 2, 1]
    parents = [[*start, *(chance.randrange(max(0, i - 4), i) for i in range(len(start), nodes))] for _ in range(rows)]
    tokens = [random_tokens(target, nodes, chance) for _ in range(rows)]
    return stack(list(zip(tokens, parents, strict=True)), target.device)


def filled(target: Target, prompts: Prompts, nodes: int) -> SlotCache:
    """A cache that holds the prompts, with room for two drafts."""
    cache = target.cache(len(prompts.rows), max(prompts.count) + 2 * nodes, nodes)
    target.read(prompts.tokens, prompts.count, cache)
    return cache


def judged(target: Target, cache: SlotCache, texts: list[list[int]], draft: Draft, tolerance: float) -> Part:
    """How `draft`, judged behind `texts`, which the cache holds, compares with plain forwards."""
    got = target.judge(draft, cache).logits
    want = torch.stack([plain_tree(target, text, draft, b) for b, text in enumerate(texts)])
    return compared(got, want, tolerance)


def plain_tree(target: Target, text: list[int], draft: Draft, row: int) -> Tensor:
    """[N, V]: the logits at each node of a row's tree, from plain forwards over `text` and one path to each leaf."""
    tokens, parent = draft.tokens[row].tolist(), draft.parent[row].tolist()
    found: dict[int, Tensor] = {}
    for leaf in (i for i in range(draft.width) if i not in parent):
        path = [leaf]
        while parent[path[0]] >= 0:
            path.insert(0, parent[path[0]])
        logits = plain(target, text + [tokens[i] for i in path])
        for i, node in enumerate(path):
            found.setdefault(node, logits[len(text) + i])
    return torch.stack([found[i] for i in range(draft.width)])


def plain(target: Target, text: list[int]) -> Tensor:
    """[T, V]: the logits at every token of `text`, by the model as transformers runs it, without a cache."""
    return target.model(input_ids=torch.tensor([text], device=target.device), use_cache=False).logits[0]


def committed(cache: SlotCache, draft: Draft, texts: list[list[int]]) -> list[list[int]]:
    """The texts after the deepest path through each row's node 2 was committed, in the last row that node's own."""
    behind = draft.ancestors[:, :, 2]  # [B, N], the nodes at or below node 2
    leaf = torch.where(behind, draft.depth, -1).argmax(-1)
    leaf[-1] = 2
    path, count = path_to(draft, leaf)
    cache.commit(path, count.tolist())
    tokens = draft.tokens.gather(1, path).tolist()
    return [text + row[:n] for text, row, n in zip(texts, tokens, count.tolist(), strict=True)]


def pieces(target: Target, prompts: Prompts, nodes: int, tolerance: float) -> Part:
    """How the logits at the last token of prompts read `PIECE` tokens at a time compare with plain forwards."""
    cache = target.cache(len(prompts.rows), max(prompts.count) + 2 * nodes, max(nodes, PIECE))
    got = torch.zeros(len(prompts.rows), target.vocab, dtype=target.dtype, device=target.device)
    for start in range(0, max(prompts.count), PIECE):
        taken = [max(0, min(PIECE, n - start)) for n in prompts.count]
        logits = target.read(prompts.tokens[:, start : start + PIECE], taken, cache).logits[:, 0]
        for b, n in enumerate(prompts.count):
            if start < n <= start + PIECE:
                got[b] = logits[b]
    want = torch.stack([plain(target, row)[-1] for row in prompts.rows])
    return compared(got[:, None], want[:, None], tolerance)


def ordinary_difference(target: Target, text: list[int], chance: Random) -> float:
    """How far transformers' own cached decoding of `MORE` tokens behind `text` is from a plain forward, by rounding."""
    text = text + random_tokens(target, MORE, chance)
    ids, cache = torch.tensor([text], device=target.device), DynamicCache(config=target.model.config)
    target.model(input_ids=ids[:, :-MORE], past_key_values=cache, use_cache=True)
    steps = [
        target.model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits[0, -1]
        for i in range(len(text) - MORE, len(text))
    ]
    return compared(torch.stack(steps), plain(target, text)[-MORE:], 0.0).difference


def compared(got: Tensor, want: Tensor, tolerance: float) -> Part:
    """The comparison of logits `got` [B, n, V] with `want`, both [..., n, V]; -inf in both is no difference."""
    got, want = got[..., : want.shape[-1]].double(), want.double()
    gap = torch.where(got == want, 0, (got - want).abs()).amax(-1)
    difference = gap / want.nan_to_num(neginf=0.0).std(-1)
    return Part(
        nodes=difference.numel(),
        beyond=int((~(difference <= tolerance)).sum()),  # nan is beyond
        difference=float(difference.max()),
        same_top=int((got.argmax(-1) == want.argmax(-1)).sum()),
    )


def verdict_of(parts: dict[str, Part], target: Target) -> str:
    """ "trees", or what is wrong; "unclear" for a few nodes in half precision."""
    wrong = {name: part for name, part in parts.items() if not part.agrees}
    if not wrong:
        return "trees"
    beyond, nodes = sum(p.beyond for p in parts.values()), sum(p.nodes for p in parts.values())
    largest = max(p.difference for p in wrong.values())
    found = f"{beyond} of {nodes} nodes differ by up to {largest:.2g} of the logits' spread ({', '.join(wrong)})"
    if target.dtype in (torch.float16, torch.bfloat16) and beyond <= nodes // 4:
        why = "rounding changes which experts a token is sent to" if routed(target) else "rounding may reach as far"
        return f"unclear: {found}; {why}: check it in float32"
    return f"wrong: {found}"


def routed(target: Target) -> bool:
    """Whether the model sends tokens to experts, which a rounding can change."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(target.config, name, None) or 0) > 1 for name in names)


def layers_text(windows: list[int | None]) -> str:
    """The layers' attention in words, such as "full" or "2 full, 4 sliding 512"."""
    kinds = ["full" if w is None else f"sliding {w}" for w in windows]
    names = sorted(set(kinds))
    return names[0] if len(names) == 1 else ", ".join(f"{kinds.count(name)} {name}" for name in names)


def render(report: Report) -> str:
    """The report for a terminal."""
    lines = [
        ("model", f"{report.model_type}, {report.model_class}, {report.dtype}, attention {report.attention}"),
        ("layers", f"{len(report.windows)}: {layers_text(report.windows)}"),
        ("prompt", f"up to {report.longest} tokens"),
    ]
    for name, part in report.parts.items():
        word = "agrees" if part.agrees else f"{part.beyond} of {part.nodes} nodes differ"
        tops = f"same top token at {part.same_top} of {part.nodes}"
        lines.append((name, f"{word}; largest difference {part.difference:.1e}, {tops}"))
    if report.ordinary is not None:
        lines.append(("for scale", f"{report.ordinary:.1e} is the difference of transformers' own cached decoding"))
    eps = f"{report.tolerance_eps:.3g} eps of {report.dtype}"
    lines.append(("tolerance", f"{report.tolerance:.1e} of the logits' spread ({eps})"))
    lines.append(("verdict", report.verdict))
    return "\n".join(f"{name:<13} {text}" for name, text in lines)


def as_dict(report: Report) -> dict[str, Any]:
    """The report for JSON."""
    parts = {name: asdict(part) | {"agrees": part.agrees} for name, part in report.parts.items()}
    return asdict(report) | {"parts": parts, "ok": report.ok}
