"""Plain decoding as slowly and obviously as possible: no cache, no batch, one token per forward over the whole prefix.

Shares with the library only the noise, which defines the sample; warping is done by transformers' own processors.
"""

from collections.abc import Sequence

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from foretoken.noise import Noise
from foretoken.sampling import Sampling


def processors_of(sampling: Sampling) -> LogitsProcessorList:
    """The caller's processors, then transformers' own warpers, in its own order."""
    found = LogitsProcessorList(sampling.processors)
    if sampling.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.temperature > 0:
        if sampling.top_k:
            found.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            found.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            found.append(MinPLogitsWarper(sampling.min_p))
    return found


def penalise(ids, scores, output: Sequence[int], sampling: Sampling):
    """Repetition, then presence and frequency penalties, token by token."""
    scores = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(ids, scores).clone()
    for token in set(output):
        scores[0, token] -= sampling.presence_penalty + sampling.frequency_penalty * list(output).count(token)
    return scores


@torch.no_grad()
def reference(
    model, prompt: Sequence[int], sampling: Sampling, *, number: int = 0, max_new_tokens: int, eos: Sequence[int] = ()
) -> list[int]:
    """The tokens that plain decoding emits after `prompt`."""
    noise = Noise.of([sampling.seed], [number], torch.device("cpu"))
    processors, text = processors_of(sampling), list(prompt)
    for _ in range(max_new_tokens):
        ids = torch.tensor([text])
        scores = model(input_ids=ids, use_cache=False).logits[:, -1]
        for token, bias in sampling.logit_bias.items():
            scores[0, token] += bias
        scores = processors(ids, penalise(ids, scores, text[len(prompt) :], sampling))
        if sampling.temperature > 0:
            position = torch.tensor([[len(text)]])
            scores = scores + noise.gumbel(position, torch.arange(scores.shape[-1]))[0]
        text.append(int(scores.argmax()))
        if text[-1] in eos:
            break
    return text[len(prompt) :]
