"""transformers' own entry returns what `generate` returns."""

import pytest
import torch
from transformers import GenerationConfig, MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList

import foretoken
from foretoken import UserError
from tests.models import BITSTORIES, STORIES, asset

MODEL = asset(BITSTORIES)
PROMPTS = ["Once upon a time", "Tom and his dog went to the park and they"]


def batch(prompts: list[str]) -> dict[str, torch.Tensor]:
    """Left-padded input ids and their mask, as transformers wants them for a batch."""
    assert MODEL.tokenizer is not None
    ids = [MODEL.tokenizer(p)["input_ids"] for p in prompts]
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[0] * (longest - len(i)) + i for i in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids]),
    }


def both(method: object, prompts: list[str], **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = batch(prompts)
    options = {"pad_token_id": 0} | options
    ours = MODEL.model.generate(**inputs, custom_generate=method, **options)
    return ours, MODEL.model.generate(**inputs, **options)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
@pytest.mark.parametrize("name", ["none", "suffix", "lookahead", "early_exit"])
def test_greedy_equals_generate(name: str, prompts: list[str]):
    ours, theirs = both(foretoken.custom_generate(name), prompts, max_new_tokens=40, do_sample=False)
    assert torch.equal(ours, theirs)


def test_processors_of_the_call_are_obeyed():
    options = {"max_new_tokens": 40, "do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2}
    ours, theirs = both(foretoken.custom_generate("lookahead"), PROMPTS[:1], **options)
    assert torch.equal(ours, theirs)


def test_end_token_and_padding():
    _, theirs = both(foretoken.custom_generate("none"), PROMPTS, max_new_tokens=40, do_sample=False)
    end = int(theirs[0, -12])
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": end, "pad_token_id": 5}
    ours, theirs = both(foretoken.custom_generate("suffix"), PROMPTS, **options)
    assert torch.equal(ours, theirs)
    assert ours.shape[1] <= batch(PROMPTS)["input_ids"].shape[1] + 40


class After(StoppingCriteria):
    """Stops when the last token is a given one."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def test_stopping_criteria_inside_a_block():
    _, theirs = both(foretoken.custom_generate("none"), PROMPTS[:1], max_new_tokens=40, do_sample=False)
    criteria = StoppingCriteriaList([After(int(theirs[0, -9])), MaxTimeCriteria(1000.0)])
    method = foretoken.custom_generate("draft_model", path=asset(STORIES))
    ours, theirs = both(method, PROMPTS[:1], max_new_tokens=40, do_sample=False, stopping_criteria=criteria)
    assert torch.equal(ours, theirs)


def test_sampling_follows_the_global_seed():
    """Same torch seed, same sample, whatever drafts; another seed, another one."""

    def sample(name: str, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        inputs, method = batch(PROMPTS[:1]), foretoken.custom_generate(name)
        options = {"do_sample": True, "temperature": 0.9, "top_k": 40, "max_new_tokens": 30, "num_return_sequences": 2}
        return MODEL.model.generate(**inputs, custom_generate=method, **options)

    assert torch.equal(sample("none", 1), sample("lookahead", 1))
    assert not torch.equal(sample("none", 1)[0], sample("none", 2)[0])
    assert not torch.equal(sample("none", 1)[0], sample("none", 1)[1])


def test_return_dict():
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True}
    ours, theirs = both(foretoken.custom_generate("suffix"), PROMPTS[:1], **options)
    assert type(ours) is type(theirs)
    assert torch.equal(ours.sequences, theirs.sequences)


@pytest.mark.parametrize("option", [{"num_beams": 2}, {"output_scores": True, "return_dict_in_generate": True}])
def test_what_cannot_be_returned_is_refused(option: dict[str, object]):
    with pytest.raises(UserError, match=next(iter(option))):
        MODEL.model.generate(
            **batch(PROMPTS[:1]),
            custom_generate=foretoken.custom_generate("none"),
            generation_config=GenerationConfig(max_new_tokens=4, **option),
        )


def test_settings_reach_the_drafter():
    with pytest.raises(UserError, match="did you mean 'window'"):
        both(foretoken.custom_generate("lookahead", windw=3), PROMPTS[:1], max_new_tokens=4, do_sample=False)
