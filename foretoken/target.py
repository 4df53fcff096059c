"""What the engine may ask of a transformers model, through public seams only.

The seams: a `Cache` of our layers, 4-D masks (a dict of them where layers differ), `position_ids`, `logits_to_keep`,
`output_hidden_states`, `get_decoder`. Nothing of the model is copied or patched.
"""

import copy
import inspect
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from foretoken.cache import Count, SlotCache
from foretoken.errors import UserError
from foretoken.rules import Rule
from foretoken.sampling import Sampler
from foretoken.tree import Draft
from foretoken.unembed import Unembedding, unembedding_of

CHUNK = 512
"""Prompt tokens read per forward."""

UNNORMED = 1 << 20
"""As a layer's number: the last layer's output before the final norm."""

NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
"""What transformers calls the norm between the last block and the output head."""

TREE_ATTENTION = ("sdpa", "eager", "foretoken")
"""transformers' attention implementations that take a mask [B, 1, n, slots]."""

ENCODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
"""Model types that transformers also runs as decoders, some with positions numbered from the padding token."""

UNSUITED = dict.fromkeys(ENCODERS, "is made for reading in both directions") | {
    "bloom": "computes ALiBi positions from a padding mask",
    "mpt": "computes ALiBi positions from a padding mask",
    "gpt_neo": "cuts its local layers' windows by cache slot, not by mask",
    "moshi": "generates sound beside text",
}
"""Why a model of this type can read no tree, where neither its cache layers nor its signature says so."""


@dataclass(frozen=True, slots=True)
class Read:
    """What one forward returns.

    logits    [B, n, V]
    features  [B, n, F], the hidden states of the layers asked for, side by side; None if none were asked for
    """

    logits: Tensor
    features: Tensor | None


class Target:
    """A causal language model that reads trees."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self.config: PreTrainedConfig = model.config.get_text_config(decoder=True)
        self.windows = layer_windows(self.config, type(model))
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        attention = model.config._attn_implementation  # pyright: ignore[reportPrivateUsage]
        if attention not in TREE_ATTENTION:
            raise UserError(
                f"The model uses {attention!r} attention, which takes no tree masks; load it with 'sdpa' or 'eager'."
            )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def vocab(self) -> int:
        return self.config.vocab_size

    @property
    def context(self) -> int | None:
        """Tokens that fit, prompt and output together; None without a limit."""
        limits = [getattr(self.config, "max_position_embeddings", None), constant_rope_length(self.config)]
        return min((n for n in limits if n is not None), default=None)

    @property
    def name(self) -> str:
        return str(self.model.name_or_path or type(self.model).__name__)

    @property
    def decoder(self) -> PreTrainedModel:
        """The model without its output head."""
        return cast(PreTrainedModel, self.model.get_decoder())

    @property
    def unembed(self) -> Unembedding:
        """The output head, as the model scales and bounds it."""
        return unembedding_of(self.model, self.config)

    @property
    def chunk(self) -> int:
        """Most nodes per forward: small beside a sliding layer's window, so that its ring of slots stays small."""
        windows = [w for w in self.windows if w is not None]
        return min(CHUNK, max(64, min(windows) // 16)) if windows else CHUNK

    def cache(self, batch: int, capacity: int, width: int = 1) -> SlotCache:
        """An empty cache for rows of `capacity` tokens and drafts of `width` nodes."""
        return SlotCache(batch, capacity, self.windows, max(self.chunk, width), self.device)

    def settled(self, features: Sequence[int] = ()) -> "Target":
        """The target that a session is to use throughout; a compiled one may still be compiling."""
        return self

    def advance(
        self,
        draft: Draft,
        cache: SlotCache,
        sampler: Sampler,
        rule: Rule,
        limits: list[int],
        eos: Tensor,
        features: Sequence[int] = (),
    ) -> Any:
        """A whole step, committed in the cache, where a target can do that: (`step.Step`, what it told the host).

        limits  per row, the most tokens that it may emit
        eos     [B, E] int64, tokens that end each row, padded with -1
        """
        return None

    def repeats(self, sampler: Sampler, rule: Rule) -> bool:
        """Whether `advance` makes several plain steps if a draft says so."""
        return False

    def judge(self, draft: Draft, cache: SlotCache, features: Sequence[int] = ()) -> Read:
        """Read a whole draft behind the committed tokens: logits and features at every node."""
        if draft.chained:
            depth = torch.arange(draft.width, device=draft.tokens.device).expand_as(draft.tokens)
            return self.extend(draft.tokens, depth, None, cache, features=features)
        return self.extend(draft.tokens, draft.depth, draft.ancestors, cache, features=features)

    def extend(
        self,
        tokens: Tensor,
        depth: Tensor,
        ancestors: Tensor | None,
        cache: SlotCache,
        *,
        offset: int = 0,
        count: list[int] | None = None,
        at: Sequence[int] | None = None,
        features: Sequence[int] = (),
    ) -> Read:
        """Read nodes `offset ..` of a tree whose earlier nodes the cache holds.

        tokens     [B, n] int64
        depth      [B, n] int64, 0 at the first uncommitted position
        ancestors  [B, n, offset + n] bool; None: a chain
        count      per row, how many of the n nodes to store (None: all)
        at         the columns whose logits are wanted (None: all)
        features   layers whose outputs are wanted; 0 is the embedding, -1 the final hidden state, `UNNORMED` (only as
                   the first) the same before the final norm
        """
        masks = cache.plan(depth, ancestors, offset, self.dtype, count)
        position = cache.length[:, None] + depth
        if self.context is not None:
            position = position.clamp(max=self.context - 1)  # nodes past the end are cut by the caller
        extra: dict[str, Any] = {}
        if at is not None and self._keeps_logits:
            extra["logits_to_keep"] = torch.tensor(at, device=tokens.device)
        with self.watched(features) as unnormed:
            out = self.model(
                input_ids=tokens,
                attention_mask=None if masks is None else self._by_layer_type(masks),
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=bool(features),
                **extra,
            )
        if at is not None and not self._keeps_logits:
            out.logits = out.logits[:, at]
        found = [*unnormed, *(out.hidden_states[i] for i in features if i != UNNORMED)]
        return Read(out.logits, torch.cat(found, -1) if features else None)

    @contextmanager
    def watched(self, features: Sequence[int]) -> Generator[list[Tensor]]:
        """A list that gets what the final norm reads [B, n, H] while the decoder runs, if `UNNORMED` is asked for."""
        seen: list[Tensor] = []
        if UNNORMED not in features:
            yield seen
            return

        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen.append(given[0])

        hook = norm_of(self)[1].register_forward_pre_hook(keep)
        try:
            yield seen
        finally:
            hook.remove()

    def _by_layer_type(self, masks: dict[int | None, Tensor]) -> Tensor | dict[str, Tensor]:
        """The mask [B, 1, n, slots] of all layers, or one per layer type where windows differ."""
        if len(masks) == 1:
            return next(iter(masks.values()))
        return {kind: masks[window] for kind, window in zip(self.config.layer_types, self.windows, strict=False)}

    def read(
        self,
        tokens: Tensor,
        count: Count,
        cache: SlotCache,
        features: Sequence[int] = (),
        on_read: Callable[[int, int], None] | None = None,
    ) -> Read:
        """Append the first `count[b]` of `tokens` [B, M] to row b, in chunks.

        Returns the logits [B, 1, V] at each row's last token and the features [B, M, F] of all of them. `on_read` is
        told the tokens read so far and M after each chunk.
        """
        B, M = tokens.shape
        if isinstance(count, Tensor):
            read = self.extend(tokens, torch.arange(M, device=tokens.device).expand(B, M), None, cache)
            cache.commit(None, count)
            return Read(read.logits.gather(1, (count - 1)[:, None, None].expand(-1, 1, self.vocab)), None)
        states: list[Tensor] = []
        logits = tokens.new_zeros(B, 1, self.vocab, dtype=self.dtype)
        for start in range(0, M, self.chunk):
            part = tokens[:, start : start + self.chunk]
            n = part.shape[1]
            taken = [max(0, min(n, c - start)) for c in count]
            node = torch.arange(n, device=tokens.device)
            ends = {b: c - 1 - start for b, c in enumerate(count) if start < c <= start + n}
            at = sorted(set(ends.values())) or [0]
            out = self.extend(
                part,
                node.expand(B, n),
                None,
                cache,
                count=taken if min(taken) < n else None,
                at=at,
                features=features,
            )
            for b, end in ends.items():
                logits[b, 0] = out.logits[b, at.index(end)]
            if out.features is not None:
                states.append(out.features)
            cache.commit(None, taken)
            if on_read is not None:
                on_read(start + n, M)
        return Read(logits, torch.cat(states, 1) if states else None)

    def shallow(self, layers: int) -> "Target":
        """The target cut after its first `layers` layers, with the final norm and head; all weights are shared."""
        total = self.config.num_hidden_layers
        if not 0 < layers < total:
            raise UserError(f"An early exit after layer {layers} was asked for; choose one of layers 1 to {total - 1}.")
        part = copy.copy(self)
        part.model, part.config = cast(PreTrainedModel, truncated(self.model, total, layers)), self.config
        part.windows = self.windows[:layers]
        return part


def norm_of(target: Target) -> tuple[str, nn.Module]:
    """The decoder's final norm, and its name."""
    for name, child in target.decoder.named_children():
        if name in NORMS:
            return name, child
    raise UserError(f"{type(target.decoder).__name__} has no final norm called {', '.join(NORMS)}; use another model.")


def truncated(module: nn.Module, total: int, kept: int) -> nn.Module:
    """A shallow copy of `module` in which every list of `total` blocks holds the first `kept`; weights are shared."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {
        name: nn.ModuleList(list(child)[:kept])
        if isinstance(child, nn.ModuleList) and len(child) == total
        else truncated(child, total, kept)
        if any(isinstance(m, nn.ModuleList) and len(m) == total for m in child.modules())
        else child
        for name, child in module.named_children()
    }
    return twin


def layer_windows(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None) -> list[int | None]:
    """Per layer, None for full attention or the length of its sliding window; `UserError` if the model cannot branch.

    Decided from the configuration and the class alone, before any weight is loaded: a cache layer that is not plain
    keys and values (recurrent state, convolution, index) cannot hold a tree.
    """
    kind = config.model_type
    require_forward(kind, config, model_class)
    refusal = UserError(
        f"{kind!r} keeps a recurrent, shared or compressed state that cannot branch or roll back, which judging a "
        "draft needs; use a model whose layers all have full or sliding attention."
    )
    if model_class is not None and model_class._is_stateful:  # pyright: ignore[reportPrivateUsage]
        raise refusal
    try:
        layers = DynamicCache(config=config).layers
    except (KeyError, AttributeError, TypeError) as error:
        raise refusal from error
    windows: list[int | None] = []
    for layer in layers:
        if type(layer) is DynamicSlidingWindowLayer:
            windows.append(layer.sliding_window)
        elif type(layer) is DynamicLayer:
            windows.append(None)
        else:
            raise refusal
    if len({w for w in windows if w is not None}) > 1:
        raise UserError(
            f"{kind!r} has sliding windows of different length, and transformers takes one mask for all of them; use "
            "another model."
        )
    return windows


def require_forward(kind: str, config: PreTrainedConfig, model_class: type[PreTrainedModel] | None) -> None:
    """`UserError` if the model's forward cannot be told where each node stands and what it sees."""
    reason = UNSUITED.get(kind)
    if getattr(config, "alibi", False):
        reason = UNSUITED["bloom"]
    if getattr(config, "attention_chunk_size", None):
        reason = "attends within chunks of fixed borders"
    if reason is not None:
        raise UserError(f"A model of type {kind!r} {reason}, so it cannot read a tree; use another model.")
    if model_class is None:
        return
    accepts = inspect.signature(model_class.forward).parameters
    for name in ("position_ids", "past_key_values"):
        if name not in accepts and not model_class._is_stateful:  # pyright: ignore[reportPrivateUsage]
            raise UserError(
                f"{model_class.__name__}.forward takes no {name}, so it cannot read a tree; use another model."
            )


def constant_rope_length(config: PreTrainedConfig) -> int | None:
    """The tokens up to which rotary frequencies stay as they are; None if they never change.

    Two scalings ("dynamic", "longrope") change all frequencies once any position of a forward passes the original
    context. Keys that are cached keep the old ones, so from there on even plain decoding depends on how its tokens were
    grouped into forwards, and rows of a batch on each other: there is no output to be equal to.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    scalings = [r for r in (rope, *rope.values()) if isinstance(r, dict)]
    name = "original_max_position_embeddings"
    own = getattr(config, name, None) or getattr(config, "max_position_embeddings", None)
    found = [r.get(name) or own for r in scalings if r.get("rope_type") in ("dynamic", "longrope")]
    return min((n for n in found if n is not None), default=None)


def model_class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' class for this configuration; `UserError` if it is no causal language model."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{config.model_type!r} is no causal language model that transformers knows; use a decoder-only model."
        )
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
