"""A suffix automaton that grows token by token: every substring of a text, how often and where it ended last.

States are sets of substrings with the same end positions (Blumer et al. 1985); extending is amortised O(1).
"""

WALK = 64  # suffixes refreshed per token; a longer chain of them exists only in very repetitive text


class SuffixAutomaton:
    """The substrings of `text`.

    A state is a number. `longest[s]` is the length of its longest substring, `link[s]` the state of the longest proper
    suffix of it that ends elsewhere too, `follow[s]` token -> state. `count[s]` and `end[s]` are the number of
    occurrences and the position after the last one, for occurrences that end before the newest token's end.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.follow: list[dict[int, int]] = [{}]
        self.link, self.longest, self.count, self.end = [-1], [0], [0], [0]
        self.last = 0

    def extend(self, token: int) -> None:
        self._settle()
        self.text.append(token)
        new, state = self._state(self.longest[self.last] + 1, {}), self.last
        while state >= 0 and token not in self.follow[state]:
            self.follow[state][token] = new
            state = self.link[state]
        self.link[new] = self._target(state, token) if state >= 0 else 0
        self.last = new

    def _settle(self) -> None:
        """Count the occurrences that end at the newest token, now that another follows."""
        state, steps = self.last, 0
        while state > 0 and steps < WALK:
            self.count[state] += 1
            self.end[state] = len(self.text)
            state, steps = self.link[state], steps + 1

    def _target(self, state: int, token: int) -> int:
        """Where `token` leads from `state`, split so that its longest substring is the state's and the token."""
        old = self.follow[state][token]
        if self.longest[old] == self.longest[state] + 1:
            return old
        clone = self._state(self.longest[state] + 1, dict(self.follow[old]))
        self.link[clone], self.link[old] = self.link[old], clone
        self.count[clone], self.end[clone] = self.count[old], self.end[old]
        while state >= 0 and self.follow[state].get(token) == old:
            self.follow[state][token] = clone
            state = self.link[state]
        return clone

    def _state(self, longest: int, follow: dict[int, int]) -> int:
        self.follow.append(follow)
        self.longest.append(longest)
        self.link.append(0)
        self.count.append(0)
        self.end.append(0)
        return len(self.follow) - 1

    @property
    def match(self) -> int:
        """The state of the longest suffix of the text that also occurred before (0, the empty one, if none did)."""
        return self.link[self.last] if self.last else 0

    def next(self, state: int) -> list[tuple[int, int, float]]:
        """(token, state, share) of what followed the substring, by count."""
        options = [(token, s, self.count[s]) for token, s in self.follow[state].items() if self.count[s]]
        total = sum(c for _, _, c in options)
        return [(token, s, c / total) for token, s, c in options]
