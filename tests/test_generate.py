"""The functions a user calls: text, streams, stops, log-probabilities, and what bad input gets."""

import pytest
import torch

import foretoken
from foretoken import Request, Session, UserError
from foretoken.drafters import make_drafter
from foretoken.text import UNFINISHED
from tests.models import BITSTORIES, STORIES, asset

TARGET = asset(BITSTORIES)
PROMPT = "Once upon a time, there was a"


def test_output_accounts_for_every_token():
    """tokens = 1 of the prompt's forward + tokens per forward x forwards, and depths sum to the accepted guesses."""
    out = foretoken.generate(TARGET, PROMPT, drafter="lookahead", max_new_tokens=60)
    assert len(out.token_ids) == len(out.drafted) == 60
    assert 1 + out.tokens_per_forward * out.forwards == pytest.approx(60)
    assert round(sum(out.accepted_per_depth) * out.forwards) == sum(out.drafted)
    assert out.accepted_per_depth == sorted(out.accepted_per_depth, reverse=True)
    assert out.exact
    assert out.finish == "length"


def test_text_continues_the_prompt():
    """Prompt and text together are the decoding of all tokens: no space is lost between them."""
    assert TARGET.tokenizer is not None
    ids = TARGET.tokenizer(PROMPT)["input_ids"]
    out = foretoken.generate(TARGET, PROMPT, drafter="suffix", max_new_tokens=30)
    whole = TARGET.tokenizer.decode(ids + out.token_ids, skip_special_tokens=True)
    assert whole == PROMPT + out.text


def test_lists_in_lists_out():
    one = foretoken.generate(TARGET, PROMPT, drafter="none", max_new_tokens=8)
    many = foretoken.generate(TARGET, [PROMPT, "The"], drafter="none", max_new_tokens=8)
    ids = foretoken.generate(TARGET, TARGET.tokenizer(PROMPT)["input_ids"], drafter="none", max_new_tokens=8)  # pyright: ignore
    assert [one.token_ids] == [many[0].token_ids] == [ids.token_ids]
    assert len(many) == 2


@pytest.mark.parametrize("drafter", ["none", "lookahead", "suffix"])
def test_stream_is_generate_in_pieces(drafter: str):
    pieces = list(foretoken.stream(TARGET, PROMPT, drafter=drafter, max_new_tokens=50, temperature=1.0, seed=4))
    whole = foretoken.generate(TARGET, PROMPT, drafter="none", max_new_tokens=50, temperature=1.0, seed=4)
    assert "".join(p.text for p in pieces) == whole.text
    assert [t for p in pieces for t in p.token_ids] == whole.token_ids
    assert pieces[-1].output is not None
    assert pieces[-1].output.text == whole.text
    assert not any(UNFINISHED in p.text for p in pieces)


@pytest.mark.parametrize("drafter", ["none", "draft_model", "lookahead"])
def test_stop_strings_cut_text_and_tokens_alike(drafter: str):
    """The stop string is cut, wherever it lies in a block or a token; no piece of it is ever shown."""
    settings = {"path": asset(STORIES)} if drafter == "draft_model" else {}
    free = foretoken.generate(TARGET, PROMPT, drafter="none", max_new_tokens=60)
    for start in (3, 20, 41):
        stop = free.text[start : start + 4]
        out = foretoken.generate(TARGET, PROMPT, drafter=drafter, settings=settings, stop=[stop], max_new_tokens=60)
        plain = foretoken.generate(TARGET, PROMPT, drafter="none", stop=[stop], max_new_tokens=60)
        assert out.text == free.text[: free.text.index(stop)]
        assert out.finish == "stop"
        assert out.token_ids == plain.token_ids == free.token_ids[: len(plain.token_ids)]
        pieces = list(
            foretoken.stream(TARGET, PROMPT, drafter=drafter, settings=settings, stop=[stop], max_new_tokens=60)
        )
        assert "".join(p.text for p in pieces) == out.text


@pytest.mark.parametrize("drafter", ["none", "lookahead"])
def test_logprobs_are_the_models_own(drafter: str):
    """Log-probabilities before temperature and penalties, those of a cache-free forward."""
    assert TARGET.tokenizer is not None
    ids = TARGET.tokenizer(PROMPT)["input_ids"]
    out = foretoken.generate(
        TARGET, PROMPT, drafter=drafter, logprobs=True, max_new_tokens=25, temperature=0.8, repetition_penalty=1.2
    )
    with torch.no_grad():
        logits = TARGET.model(input_ids=torch.tensor([ids + out.token_ids])).logits[0, len(ids) - 1 : -1]
    want = logits.log_softmax(-1)[torch.arange(25), torch.tensor(out.token_ids)]
    assert out.logprobs == pytest.approx(want.tolist(), abs=1e-5)


def test_lossy_rules_say_so():
    out = foretoken.generate(
        TARGET, PROMPT, drafter="draft_model", settings={"path": asset(STORIES)}, rule="lossy_top_k", max_new_tokens=20
    )
    assert not out.exact
    assert foretoken.generate(TARGET, PROMPT, drafter="none", rule="rejection", max_new_tokens=5).exact


def test_a_session_goes_on_step_by_step():
    """`step` returns what each row emitted; together it is the output."""
    drafter = make_drafter("suffix", TARGET)
    session = Session(TARGET, drafter, [Request([1, 5, 9, 5], max_new_tokens=12), Request([1, 7], max_new_tokens=5)])
    emitted = [row.output for row in session.rows]
    while session.running:
        for mine, new in zip(emitted, session.step(), strict=True):
            mine += new
    assert [row.output for row in session.rows] == emitted
    assert [len(e) for e in emitted] == [12, 5]
    before = [(row.forwards, row.ended) for row in session.rows]
    assert session.rows[1].ended < session.rows[0].ended  # a finished row's clock stands while others run
    assert session.step() == [[], []]
    assert [(row.forwards, row.ended) for row in session.rows] == before


BAD = [
    ({"temperature": -1.0}, "temperature is -1.0; it must be 0 or more"),
    ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
    ({"drafter": "sufix"}, "did you mean 'suffix'"),
    ({"drafter": "lookahead", "settings": {"gram": 3}}, "did you mean 'ngram'"),
    ({"drafter": "lookahead", "settings": {"ngram": "three"}}, "must be a whole number"),
    ({"drafter": "lookahead", "settings": {"ngram": 1}}, "ngram is 1; it must be 2 or more"),
    ({"drafter": "draft_model"}, "draft_model:PATH"),
    ({"drafter": "draft_model:/nowhere/at/all"}, "'/nowhere/at/all' is no model"),
    ({"rule": "typical"}, "did you mean 'lossy_typical'"),
    ({"batch_size": 0}, "batch_size is 0; decode at least 1"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0; ask for at least 1"),
    ({"logit_bias": {512: 1.0}}, "the vocabulary has 0 to 511"),
    ({"drafter": "early_exit", "settings": {"layers": 8}}, "choose one of layers 1 to 7"),
    ({"drafter": "draft_model", "settings": {"path": asset(STORIES), "width": 2}, "rule": "block"}, "judges chains"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_settings(options: dict[str, object], message: str):
    with pytest.raises(UserError) as caught:
        foretoken.generate(TARGET, PROMPT, **options)
    assert message in str(caught.value)
    assert str(caught.value).endswith((".", "?"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "empty"), ([], "no prompt"), ([[]], "empty"), ([1] * 512, "context is 512"), ([1, 600], "token 600")],
    ids=["no text", "no prompts", "no tokens", "too long", "foreign"],
)
def test_bad_prompts(prompt: object, message: str):
    with pytest.raises(UserError, match=message):
        foretoken.generate(TARGET, prompt, drafter="none")  # pyright: ignore


def test_a_batch_too_large_for_memory(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("foretoken.cache.psutil.virtual_memory", lambda: type("Memory", (), {"available": 10_000})())
    with pytest.raises(UserError, match=r"A batch of 1 rows of \d+ tokens needs .* use a smaller batch"):
        foretoken.generate(TARGET, PROMPT, drafter="none")
