"""Plain decoding: a tree of one node."""

from dataclasses import dataclass, replace

from foretoken.drafter import Feed, Needs, Stateless
from foretoken.target import Target
from foretoken.tree import Draft, chain


@dataclass(frozen=True, slots=True)
class Config:
    pass


class Plain:
    needs = Needs(width=1)

    def start(self, batch: int, capacity: int) -> Stateless:
        return Stateless()

    def propose(self, feed: Feed, state: Stateless) -> Draft:
        return replace(chain(feed.root.unsqueeze(1)), times=feed.run)


def build(target: Target, config: Config) -> Plain:
    return Plain()
