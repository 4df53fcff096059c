"""What heads weigh: parameters, arithmetic and memory of every kind of head beside a model of given sizes.

Kinds are named as the drafters are, and their modules are the same, weight for weight. Arithmetic counts two operations
per weight of a matrix and token forward, and six with the backward pass (Kaplan et al. 2020, arXiv:2001.08361);
attention over the text and everything that is no matrix product are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

FORWARD, TRAINED = 2, 6
"""Operations per weight and token, of a forward and of a step of training."""
BYTES = 4
"""Of a float32."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer's weights.

    parameters  all of them
    matrices    those that a token is multiplied by
    """

    parameters: int
    matrices: int


@dataclass(frozen=True, slots=True)
class Target:
    """
    hidden      H
    vocab       V
    parameters  of the whole model
    inner       size of a layer's MLP
    layers      how many (a head that mixes all layers has a number for each, and one for the embeddings)
    keys        size of all keys of a token, and of all values (0: H)
    layer       the last layer, if it is not what `llama_layer` makes of these sizes
    experts     of its MLP (0: it has one MLP); all are counted, whatever a token uses
    """

    hidden: int
    vocab: int
    parameters: int
    inner: int
    layers: int = 32
    keys: int = 0
    layer: Layer | None = None
    experts: int = 0

    def llama_layer(self, inputs: int = 0, norms: int = 2) -> Layer:
        """A Llama layer of these sizes whose attention reads `inputs` numbers (0: H) and that has so many norms."""
        attention = (inputs or self.hidden) * (self.hidden + 2 * (self.keys or self.hidden)) + self.hidden**2
        matrices = attention + 3 * self.hidden * self.inner
        return Layer(matrices + norms * self.hidden, matrices)

    @property
    def last(self) -> Layer:
        """The target's own last layer."""
        return self.layer or self.llama_layer()

    @property
    def unembedding(self) -> int:
        """dV, the weights of one output head."""
        return self.hidden * self.vocab


def usual_inner(hidden: int) -> int:
    """Two thirds of 4H, rounded up to a multiple of 256: Llama's rule (arXiv:2302.13971, section 2.2)."""
    return -(-8 * hidden // 3 // 256) * 256


@dataclass(frozen=True, slots=True)
class Heads:
    """What one kind of head costs.

    kind        its name
    guesses     tokens that it guesses
    units       heads, modules or layers that have weights of their own
    parameters  of all of them; what they share with the target is not counted
    matrices    weights that a token is multiplied by to make all the guesses, the target's output head included
    """

    kind: str
    guesses: int
    units: int
    parameters: int
    matrices: int

    @property
    def each(self) -> float:
        """Parameters per unit."""
        return self.parameters / self.units

    @property
    def drafting(self) -> int:
        """Operations to make the guesses behind one token."""
        return FORWARD * self.matrices

    @property
    def training(self) -> int:
        """Operations per token of training, the heads' own, forward and backward."""
        return TRAINED * self.matrices


def linear(t: Target, guesses: int) -> Heads:
    """A matrix [V, H] per guess on the final state: the plainest heads."""
    return Heads("linear", guesses, guesses, guesses * t.unembedding, guesses * t.unembedding)


def mtp(t: Target, guesses: int) -> Heads:
    """A transformer layer per guess on the trunk, output head shared (arXiv:2404.19737)."""
    each = t.last
    return Heads("mtp", guesses, guesses, guesses * each.parameters, guesses * (each.matrices + t.unembedding))


def medusa(t: Target, guesses: int) -> Heads:
    """A residual block and an output head of its own per guess: d² + d + dV (arXiv:2401.10774)."""
    block = t.hidden**2
    total = guesses * (block + t.hidden + t.unembedding)
    return Heads("medusa", guesses, guesses, total, guesses * (block + t.unembedding))


def medusa_shared(t: Target, guesses: int) -> Heads:
    """A residual block per guess, output head shared: d² + d."""
    own = medusa(t, guesses)
    return Heads("medusa, shared", guesses, guesses, own.parameters - guesses * t.unembedding, own.matrices)


def blockwise(t: Target, guesses: int, inner: int = 0) -> Heads:
    """One layer for all guesses, H -> k d_h -> k H with biases, output head shared (arXiv:1811.03115, section 6).

    Its second matrix grows with k². The paper sends head 1 through it too: k heads are then `guesses` = k here.
    """
    k, wide = guesses, guesses * (inner or t.hidden)
    matrices = t.hidden * wide + wide * k * t.hidden
    return Heads("blockwise", k, 1, matrices + wide + k * t.hidden, matrices + k * t.unembedding)


def weighted_heads(t: Target, guesses: int) -> Heads:
    """A feed-forward head per guess on its own mixture of all layers, output head shared (arXiv:2502.09419)."""
    matrices = 2 * t.hidden**2
    each = matrices + t.hidden + t.layers + 1
    return Heads("weighted_heads", guesses, guesses, guesses * each, guesses * (matrices + t.unembedding))


def deepseek_module(t: Target) -> Layer:
    """A projection [H, 2H], a layer and three norms (arXiv:2412.19437, section 2.2)."""
    projection = 2 * t.hidden**2
    return Layer(projection + t.last.parameters + 3 * t.hidden, projection + t.last.matrices)


def deepseek(t: Target, guesses: int) -> Heads:
    """A module per guess, embedding and output head shared."""
    each = deepseek_module(t)
    total = guesses * each.parameters
    return Heads("deepseek_mtp", guesses, guesses, total, guesses * (each.matrices + t.unembedding))


def deepseek_reused(t: Target, guesses: int) -> Heads:
    """One module that makes every guess (FastMTP, arXiv:2509.18362)."""
    each = deepseek_module(t)
    return Heads("deepseek_mtp, reused", guesses, 1, each.parameters, guesses * (each.matrices + t.unembedding))


def eagle1(t: Target, guesses: int) -> Heads:
    """A projection [H, 2H] with bias and a layer without its first norm, output head shared (arXiv:2401.15077)."""
    projection, layer = 2 * t.hidden**2, t.llama_layer(norms=1)
    matrices = projection + layer.matrices
    total = projection + t.hidden + layer.parameters
    return Heads("eagle1", guesses, 1, total, guesses * (matrices + t.unembedding))


def eagle3(t: Target, guesses: int, vocabulary: int = 0) -> Heads:
    """A fusion [H, 3H], a layer whose attention reads 2H, an output head of its own over V' (arXiv:2503.01840).

    V' = `vocabulary` (0: V). The fusion is read once; the rest once per guess.
    """
    fusion, layer = 3 * t.hidden**2, t.llama_layer(2 * t.hidden, norms=3)
    output = t.hidden * (vocabulary or t.vocab)
    total = fusion + layer.parameters + t.hidden + output
    return Heads("eagle3", guesses, 1, total, fusion + guesses * (layer.matrices + output))


KINDS: tuple[Callable[[Target, int], Heads], ...] = (
    linear,
    mtp,
    medusa,
    medusa_shared,
    blockwise,
    weighted_heads,
    deepseek,
    deepseek_reused,
    eagle1,
    eagle3,
)


def logits_bytes(tokens: int, vocab: int, heads: int, size: int = BYTES) -> int:
    """Bytes of the logits of `tokens` tokens under `heads` heads at once; head by head is `heads` = 1.

    Their gradients take as much again.
    """
    return heads * tokens * vocab * size
