"""transformers' own entry: `model.generate(..., custom_generate=foretoken.custom_generate("suffix"))`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from foretoken.decode import Request, Row
from foretoken.drafter import Drafter
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.generation import decode_all
from foretoken.rules import Rule, make_rule
from foretoken.sampling import Sampling
from foretoken.target import Target


def custom_generate(
    drafter: str | Drafter = "suffix", *, rule: str | Rule = "match", **settings: Any
) -> Callable[..., Tensor | GenerateDecoderOnlyOutput]:
    """A decoding method for `model.generate`, returning what `generate` returns.

    The call's own arguments are obeyed: logits processors and warpers (per tree node), stopping criteria (per token),
    `max_new_tokens`, end and padding tokens, left-padded batches, `num_return_sequences`. Sampling draws its seed from
    torch's global generator, so `torch.manual_seed` fixes it; the sample is not transformers' own, but of the same law.
    """

    def method(
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        refuse(generation_config)
        target = Target(model)
        requests = requests_of(input_ids, model_kwargs.get("attention_mask"), logits_processor, generation_config)
        until = [c for c in stopping_criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
        rows = decode_all(
            target,
            make_drafter(drafter, target, settings),
            [with_criteria(r, until, input_ids.device) for r in requests],
            make_rule(rule),
        )
        sequences = padded(input_ids, rows, generation_config)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)  # pyright: ignore[reportArgumentType]
        return sequences

    return method


def refuse(config: GenerationConfig) -> None:
    """`UserError` for what parallel decoding cannot return."""
    if (config.num_beams or 1) > 1:
        raise UserError(f"num_beams is {config.num_beams}; parallel decoding keeps one hypothesis: use num_beams=1.")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            raise UserError(f"{name}=True was asked for; drafted steps have no such tuple: use foretoken.generate.")


def requests_of(
    input_ids: Tensor, mask: Tensor | None, processors: LogitsProcessorList, config: GenerationConfig
) -> list[Request]:
    """One request per row of input_ids [B, L], its padding (mask [B, L] zero) taken off."""
    real = torch.ones_like(input_ids) if mask is None else mask
    seed = int(torch.randint(2**62, ())) if config.do_sample else 0
    sampling = Sampling(temperature=float(bool(config.do_sample)), processors=tuple(processors), seed=seed)
    ends = config.eos_token_id
    return [
        Request(
            tokens=row[keep.bool()].tolist(),
            sampling=sampling,
            number=i,
            max_new_tokens=int(config.max_length or 20) - input_ids.shape[1],
            eos=() if ends is None else [ends] if isinstance(ends, int) else list(ends),
        )
        for i, (row, keep) in enumerate(zip(input_ids, real, strict=True))
    ]


def with_criteria(request: Request, criteria: Sequence[Any], device: torch.device) -> Request:
    """The request, ended as soon as any stopping criterion holds for prompt and output so far."""

    def until(text: list[int]) -> bool:
        ids = torch.tensor([text], device=device)
        return any(bool(c(ids, None).any()) for c in criteria)

    return replace(request, until=until) if criteria else request


def padded(input_ids: Tensor, rows: list[Row], config: GenerationConfig) -> Tensor:
    """[B, L + longest output]: the given prompts and their outputs, padded behind as `generate` does."""
    longest = max(len(row.output) for row in rows)
    ends = config.eos_token_id
    fill = (
        config.pad_token_id if config.pad_token_id is not None else ends if isinstance(ends, int) else (ends or [0])[0]
    )
    new = torch.full((len(rows), longest), fill, dtype=input_ids.dtype, device=input_ids.device)
    for b, row in enumerate(rows):
        new[b, : len(row.output)] = torch.tensor(row.output, device=input_ids.device)
    return torch.cat([input_ids, new], 1)
