"""The suffix automaton against all substrings, one by one."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from foretoken.automaton import WALK, SuffixAutomaton

settings.load_profile("ci")  # the same examples every time, and no deadline on a busy machine

texts = st.lists(st.integers(0, 2), min_size=1, max_size=40) | st.lists(st.integers(0, 9), min_size=1, max_size=40)


def built(text):
    automaton = SuffixAutomaton()
    for token in text:
        automaton.extend(token)
    return automaton


def ends(text, part):
    """Positions behind every occurrence of `part` that ends before the text does."""
    n = len(part)
    return [i + n for i in range(len(text) - n) if text[i : i + n] == part]


def state_of(automaton, part):
    state = 0
    for token in part:
        state = automaton.follow[state][token]
    return state


@given(texts)
def test_match_is_the_longest_suffix_that_came_before(text):
    automaton = built(text)
    length = max(n for n in range(len(text)) if n == 0 or ends(text, text[len(text) - n :]))
    assert automaton.longest[automaton.match] == length
    assert automaton.match == state_of(automaton, text[len(text) - length :])


@given(texts)
def test_every_substring_is_counted_and_its_last_end_known(text):
    automaton = built(text)
    for i in range(len(text)):
        for j in range(i + 1, len(text) + 1):
            part = text[i:j]
            state, found = state_of(automaton, part), ends(text, part)
            assert automaton.count[state] == len(found)
            assert automaton.end[state] == (found[-1] if found else 0)


@given(texts)
def test_next_tells_what_followed_the_match_and_how_often(text):
    automaton = built(text)
    part = text[len(text) - automaton.longest[automaton.match] :] if automaton.match else []
    followers = Counter(text[e] for e in ends(text, part) if e < len(text) - 1)
    if not part:
        followers = Counter(text[:-1])
    total = sum(followers.values())
    found = automaton.next(automaton.match)
    assert {token: share for token, _, share in found} == {t: c / total for t, c in followers.items()}
    for token, state, _ in found:
        assert state == state_of(automaton, [*part, token])


@given(texts)
def test_nothing_but_substrings_is_known(text):
    automaton = built(text)
    known = {()}
    frontier = [((), 0)]
    while frontier:
        part, state = frontier.pop()
        for token, s in automaton.follow[state].items():
            known.add((*part, token))
            frontier.append(((*part, token), s))
    assert known == {tuple(text[i:j]) for i in range(len(text) + 1) for j in range(i, len(text) + 1)}


def test_growing_and_asking_alternate():
    """States asked for between tokens do not change what comes later."""
    text = [0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 1]
    asked, plain = SuffixAutomaton(), built(text)
    for token in text:
        asked.extend(token)
        asked.next(asked.match)
    assert (asked.count, asked.end, asked.link, asked.follow) == (plain.count, plain.end, plain.link, plain.follow)


def test_very_repetitive_text_is_counted_up_to_the_walk():
    """One token only: a suffix has as many suffixes as tokens, of which the longest WALK are refreshed per token."""
    n = 3 * WALK
    automaton = built([7] * n)
    assert automaton.longest[automaton.match] == n - 1
    for length in range(1, n + 1):
        true = n - length  # occurrences that end before the text does
        counted = automaton.count[state_of(automaton, [7] * length)]
        assert counted == min(true, WALK)
