"""EAGLE checkpoints of other projects: tiny ones in their layouts guess what their formulas, written out, say."""

import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.hub import cached_file

from foretoken import native, published
from foretoken import saved as store
from foretoken.block import Size, Stretch, turns
from foretoken.decode import Request
from foretoken.drafters import make_drafter
from foretoken.errors import UserError
from foretoken.generation import decode_all
from foretoken.rules import Match
from foretoken.sampling import Sampling
from foretoken.target import UNNORMED, Target
from tests.families import make
from tests.reference import reference
from tests.test_eagle import attended, mlp, norm
from tests.test_feedback import PROMPTS, Watched, features_of, steps_of

H, V, L = 48, 80, 3
SIZE = Size(hidden=H, heads=4, groups=2, head=8, inner=40, theta=500.0, eps=1e-2)
LAYER: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": H,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-2,
    "num_hidden_layers": 1,
    "vocab_size": V,
}
IDS = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class Case:
    """What the folder holds, and what its drafter is to compute.

    config    beside LAYER, or around it in the speculators format
    states    fused, i being the input of layer i, the last one being before the final norm
    version   1 or 3
    before    what the layer's keys begin with
    drafted   tokens of the draft vocabulary (0: all, no d2t)
    normed    the residual is the normed state
    biased    projections that have a bias
    weights   the file
    """

    config: dict[str, Any] = field(default_factory=dict)
    states: tuple[int, ...] = (0, 1, 2)
    version: int = 3
    before: str = "midlayer."
    drafted: int = 30
    normed: bool = False
    biased: str = ""
    weights: str = "model.safetensors"

    @property
    def norms(self) -> str:
        """What norms the features: fc_norm each, input_norm all of them together, or nothing."""
        flags = self.config | self.config.get("eagle_config", {})
        return "fc_norm" if flags.get("fc_norm") else "input_norm" if flags.get("norm_before_fc") else ""


CASES = {
    "eagle 1": Case({"bias": True}, (L,), 1, "layers.0."),
    "eagle 2, of Qwen2": Case({"bias": False, "qkv_bias": True}, (L,), 1, "layers.0.", biased="qkv"),
    "eagle 3": Case({"draft_vocab_size": 30}, weights="pytorch_model.bin"),
    "eagle 3, whole vocabulary": Case({"attention_bias": True}, before="layers.0.", drafted=0, biased="qkvo"),
    "residual normed": Case({"norm_before_residual": True, "draft_vocab_size": 30, IDS: [3, 1]}, (1, 3), normed=True),
    "eagle 3.1": Case(
        {"fc_norm": True, "norm_output": True, "draft_vocab_size": 30, "eagle_config": {IDS: [1, 2]}}, (2, 3)
    ),
    "inputs in eagle_config": Case({"draft_vocab_size": 30, "eagle_config": {IDS: [2, 0]}}, (0, 2)),
    "normed before fc": Case(
        {"draft_vocab_size": 30, "eagle_config": {"norm_before_fc": True, IDS: [0, 2, 3]}},
        (0, 2, 3),
        before="layers.0.",
    ),
    "speculators": Case(
        {
            "speculators_model_type": "eagle3",
            "draft_vocab_size": 30,
            "norm_before_residual": True,
            "target_hidden_size": None,
            "fc_norm": False,
        },
        before="layers.0.",
        normed=True,
    ),
}

Keys = dict[str, Tensor]


def tensors_of(case: Case, target: Target, seed: int = 0) -> Keys:
    """Random ones, with the names that are published."""
    draw = torch.Generator().manual_seed(seed)
    wide, fused = (H, 2 * H) if case.version == 1 else (2 * H, len(case.states) * H)
    shapes = {
        "fc.weight": (H, fused),
        "self_attn.q_proj.weight": (32, wide),
        "self_attn.k_proj.weight": (16, wide),
        "self_attn.v_proj.weight": (16, wide),
        "self_attn.o_proj.weight": (H, 32),
        "mlp.gate_proj.weight": (40, H),
        "mlp.up_proj.weight": (40, H),
        "mlp.down_proj.weight": (H, 40),
        "post_attention_layernorm.weight": (H,),
    }
    shapes |= {f"self_attn.{p}_proj.bias": ({"q": 32, "o": H}.get(p, 16),) for p in case.biased}
    if case.config.get("bias"):
        shapes["fc.bias"] = (H,)
    if case.version == 3:
        shapes |= {f"{name}.weight": (H,) for name in ("hidden_norm", "input_layernorm", "norm")}
        shapes["lm_head.weight"] = (case.drafted or V, H)
    if case.norms == "fc_norm":
        shapes |= {f"fc_norm.{i}.weight": (H,) for i in range(len(case.states))}
    if case.norms == "input_norm":
        shapes["input_norm.weight"] = (fused,)
    found = {name: torch.randn(shape, generator=draw) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    found |= {k: 1 + 3 * v for k, v in found.items() if "norm" in k}
    outer = ("fc", "norm.", "lm_head.", "input_norm.")
    found = {k if k.startswith(outer) else case.before + k: v for k, v in found.items()}
    if case.version == 3 and case.drafted:
        tokens = torch.randperm(V, generator=draw)[: case.drafted].sort().values
        found["d2t"] = tokens - torch.arange(case.drafted)
        found["t2d"] = torch.zeros(V, dtype=torch.bool).index_fill_(0, tokens, True)
    if case.version == 1 or case.before == "layers.0.":
        found["embed_tokens.weight"] = target.model.get_input_embeddings().weight.detach().half()
    return found


def write(folder: Path, case: Case, tensors: Keys, **config: Any) -> str:
    """The checkpoint in `folder`, with other settings where some are given."""
    folder.mkdir(exist_ok=True)
    layer = {"transformer_layer_config": LAYER} if "speculators_model_type" in case.config else LAYER
    (folder / "config.json").write_text(json.dumps(layer | case.config | config))
    if case.weights.endswith(".bin"):
        torch.save(tensors, folder / case.weights)
    else:
        save_file(tensors, folder / case.weights, {"format": "pt"})
    return f"eagle:{folder}"


def said(case: Case, target: Target, tensors: Keys, text: list[int], path: list[int]) -> Tensor:
    """[V] logits behind `path`, guessed behind `text`, whose last token the target has not read."""
    w = {k.removeprefix(case.before): v.double() for k, v in tensors.items()}
    embed, eps = target.model.get_input_embeddings(), SIZE.eps
    w |= {k: v for k, v in w.items() if not k.endswith("bias")}
    for part in "qkv":  # a bias is the weight of a 1 that is read beside the rest
        bias = w.get(f"self_attn.{part}_proj.bias", torch.zeros(len(w[f"self_attn.{part}_proj.weight"])).double())
        w[f"self_attn.{part}_proj.weight"] = torch.cat([w[f"self_attn.{part}_proj.weight"], bias[:, None]], 1)
    tokens = torch.tensor([text[:-1]])
    if case.version == 1:
        state = features_of(target, tokens, (-1,))[0]
    else:
        parts = [features_of(target, tokens, (UNNORMED if i == L else i,))[0] for i in case.states]
        if case.norms == "fc_norm":
            parts = [norm(part, w[f"fc_norm.{i}.weight"], eps) for i, part in enumerate(parts)]
        fused = torch.cat(parts, -1)
        state = (norm(fused, w["input_norm.weight"], eps) if case.norms == "input_norm" else fused) @ w["fc.weight"].T
    rows, next_tokens = torch.zeros(0, 2 * H + 1 if case.version == 3 else H + 1).double(), text[1:]
    for token in [None, *path]:
        embedded = embed(torch.tensor(next_tokens if token is None else [token]))
        if case.version == 1:
            read = residual = torch.cat([embedded, state], -1) @ w["fc.weight"].T + w.get("fc.bias", torch.zeros(H))
        else:
            hidden = norm(state, w["hidden_norm.weight"], eps)
            read = torch.cat([norm(embedded, w["input_layernorm.weight"], eps), hidden], -1)
            residual = hidden if case.normed else state
        rows = torch.cat([rows, torch.cat([read, torch.ones(len(read), 1)], -1)])
        last = len(rows) - 1
        out = residual[-1:] + attended(w, SIZE, rows, [(last, last)]) + w.get("self_attn.o_proj.bias", torch.zeros(H))
        state = out + mlp(w, norm(out, w["post_attention_layernorm.weight"], eps))
        if case.version == 3:
            ready = norm(state, w["norm.weight"], eps)
            state = ready if case.config.get("norm_output") else state
    if case.version == 1:
        return target.unembed(state)[0]
    logits = (ready @ w["lm_head.weight"].T)[0]
    if not case.drafted:
        return logits
    found = torch.full((V,), -torch.inf, dtype=torch.float64)
    for draft, offset in enumerate(tensors["d2t"].tolist()):
        found[draft + offset] = logits[draft]
    return found


def loaded(folder: Path, case: Case, target: Target, tensors: Keys | None = None, **config: Any) -> Any:
    name = write(folder, case, tensors_of(case, target) if tensors is None else tensors, **config)
    return make_drafter(name, target, {"depth": 3, "width": 2, "tree": "beam"})


def largest_difference(case: Case, target: Target, drafter: Any, tensors: Keys) -> float:
    """Of the logits of every depth, over some steps of a ragged, sampled batch."""
    watched = Watched(drafter)
    steps_of(watched, target)
    differences = []
    for depth in range(3):
        nodes = [(text, path, logits) for text, path, logits in watched.seen if len(path) == depth]
        for text, path, logits in nodes[:: max(1, len(nodes) // 5)]:
            want = said(case, target, tensors, text, path)
            assert torch.equal(want.isneginf(), logits.isneginf())
            differences.append(float((want - logits)[~want.isneginf()].abs().max()))
    return max(differences)


@torch.no_grad()
@pytest.mark.parametrize("key", CASES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_guesses_are_those_of_the_published_formulas(name: str, key: str, tmp_path: Path):
    """The first, the second and the third, behind texts of every length, one token included."""
    target, case = make(name), CASES[key]
    tensors = tensors_of(case, target)
    drafter = loaded(tmp_path, case, target, tensors)
    assert drafter.heads.size == SIZE
    assert largest_difference(case, target, drafter, tensors) < 2e-4  # angles are float32


SWAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "the residual is not normed": ("residual normed", {"norm_before_residual": False}),
    "the residual is normed": ("eagle 3", {"norm_before_residual": True}),
    "states one layer later": ("residual normed", {IDS: [0, 2]}),
    "states one layer earlier": ("residual normed", {IDS: [2, 3]}),
    "outputs taken for inputs": ("eagle 3.1", {"eagle_config": {}, IDS: [1, 2]}),
    "the next step reads the raw output": ("eagle 3.1", {"norm_output": False}),
    "another eps": ("eagle 3", {"rms_norm_eps": 1e-6}),
    "another base": ("eagle 3", {"rope_theta": 10000.0}),
    "rotations slowed": ("eagle 1", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
}


@torch.no_grad()
@pytest.mark.parametrize("change", SWAPPED)
def test_a_wrong_flag_makes_other_guesses(change: str, tmp_path: Path):
    """So that the test above would see it."""
    key, config = SWAPPED[change]
    target, case = make("llama"), CASES[key]
    tensors = tensors_of(case, target)
    assert largest_difference(case, target, loaded(tmp_path, case, target, tensors, **config), tensors) > 1e-2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("key", CASES)
def test_the_output_is_plain_decoding_s(key: str, temperature: float, tmp_path: Path):
    """Token for token, in a ragged batch, in trees."""
    target, sampling = make("llama"), Sampling(temperature=temperature, seed=4)
    drafter = loaded(tmp_path, CASES[key], target)
    requests = [Request(tuple(p), sampling, i, 14) for i, p in enumerate(PROMPTS)]
    rows = decode_all(target, drafter, requests, Match(), batch_size=3)
    for i, (row, prompt) in enumerate(zip(rows, PROMPTS, strict=True)):
        assert row.output == reference(target.model, prompt, sampling, number=i, max_new_tokens=14)


def test_d2t_is_an_offset_and_the_tree_guesses_its_tokens(tmp_path: Path):
    target, case = make("llama"), CASES["eagle 3"]
    drafter = loaded(tmp_path, case, target, tensors := tensors_of(case, target))
    assert drafter.unembed().tokens.tolist() == [i + o for i, o in enumerate(tensors["d2t"].tolist())]
    assert drafter.unembed().tokens.tolist() == tensors["t2d"].nonzero()[:, 0].tolist()
    assert drafter.needs.features == (0, 1, 2)


def test_the_usual_states_are_eagle_3_s():
    """The inputs of layers 2, L / 2 and L - 3, in the layers' order."""
    target = make("llama")
    for layers, want in ((32, (2, 16, 29)), (5, (2,)), (4, (1, 2))):
        target.config.num_hidden_layers = layers
        assert published.features("x", {}, target) == want


@pytest.mark.parametrize(
    ("ids", "want"),
    [
        ({IDS: [1, 16]}, (1, 16)),
        ({"eagle_config": {IDS: [1, 15, 28]}}, (2, 16, 29)),
        ({"eagle_config": {IDS: [2, 16, 29]}}, (2, 16, 29)),
        ({"eagle_config": {IDS: []}}, (2, 16, 29)),
        ({IDS: [3], "eagle_config": {IDS: [1]}}, (3,)),
        ({IDS: [32, 24, 30]}, (UNNORMED, 24, 30)),
    ],
)
def test_which_states_are_read(ids: dict[str, Any], want: tuple[int, ...]):
    target = make("llama")
    target.config.num_hidden_layers = 32
    assert published.features("x", ids, target) == want


def test_slowed_rotations_are_transformers_own(tmp_path: Path):
    rope = {"rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64}
    target, case = make("llama"), CASES["eagle 3"]
    old = {k: v for k, v in rope.items() if k != "rope_theta"}
    for kind, given in (("llama3", {"rope_parameters": rope}), ("linear", {"rope_scaling": old})):
        found = next(iter(given.values()))
        key = "rope_type" if "rope_parameters" in given else "type"
        drafter = loaded(tmp_path, case, target, **{next(iter(given)): found | {key: kind}})
        config = LlamaConfig(head_dim=8, rope_parameters=rope | {"rope_type": kind})
        frequency, _ = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        angle = (torch.arange(90)[:, None] * frequency).repeat(1, 2)
        cosine, sine = turns(drafter.heads.size, torch.arange(90)[None], torch.float32)
        torch.testing.assert_close(cosine[0, 0], angle.cos(), rtol=0, atol=1e-5)
        torch.testing.assert_close(sine[0, 0], angle.sin(), rtol=0, atol=1e-5)
        assert drafter.heads.size == replace(SIZE, stretch=Stretch(8.0, 1.0, 4.0, 64 if kind == "llama3" else 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_embedding_may_have_been_rounded(dtype: torch.dtype, tmp_path: Path):
    target, case = make("llama"), CASES["eagle 1"]
    tensors = tensors_of(case, target)
    tensors["embed_tokens.weight"] = target.model.get_input_embeddings().weight.detach().to(dtype)
    loaded(tmp_path, case, target, tensors)


def test_stored_frequencies_are_not_needed(tmp_path: Path):
    target, case = make("llama"), CASES["eagle 1"]
    loaded(tmp_path, case, target, tensors_of(case, target) | {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})


def test_another_models_drafter_if_asked_for(tmp_path: Path):
    """Its own embedding is not used."""
    target, case = make("llama"), CASES["eagle 1"]
    name = write(tmp_path, case, tensors_of(case, make("llama", seed=9)))
    with pytest.raises(UserError, match=r"token embedding in '.*' is not this target's.*set other_target=true"):
        make_drafter(name, target)
    assert make_drafter(name, target, {"other_target": "true"})


def test_calibrated_trees_lie_beside_it(tmp_path: Path):
    """`foretoken calibrate` leaves a description without an architecture, and the folder stays what it was."""
    target, case = make("llama"), CASES["eagle 3"]
    loaded(tmp_path, case, target)
    trees = {"0": [[0], [1], [0, 0]]}
    store.describe(tmp_path, store.Saved("eagle", {}, store.identity(target), trees))
    drafter: Any = make_drafter(f"eagle:{tmp_path}", target)
    assert drafter.plan.trees == {0.0: trees["0"]}


def test_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As transformers finds its files; here they are in a folder, and nothing is fetched."""
    target, case = make("llama"), CASES["eagle 1"]
    write(tmp_path, case, tensors_of(case, target))

    def found(name: str, file: str, **options: Any) -> str | None:
        assert name == "someone/eagle"
        return cached_file(str(tmp_path), file, **options)

    for module in (published, native):
        monkeypatch.setattr(module, "cached_file", found)
    assert make_drafter("eagle:someone/eagle", target)
    with pytest.raises(UserError, match=r"no EAGLE at './someone/eagle'"):
        make_drafter("eagle:./someone/eagle", target)

    def unknown(name: str, file: str, **options: Any) -> str | None:
        raise OSError("someone/eagle is gated.\nMore.")

    monkeypatch.setattr(published, "cached_file", unknown)
    with pytest.raises(UserError, match=r"no EAGLE at 'someone/eagle' \(someone/eagle is gated\): neither"):
        make_drafter("eagle:someone/eagle", target)


Change = Callable[[Keys], object]
SPOILT: dict[str, tuple[str, dict[str, Any], Change, str]] = {
    "missing": (
        "eagle 3",
        {},
        lambda keys: keys.pop("midlayer.mlp.up_proj.weight"),
        r"not those of EAGLE-3: missing \['midlayer\.mlp\.up_proj\.weight'\], unexpected nothing",
    ),
    "surplus": (
        "eagle 1",
        {},
        lambda keys: keys.update({"layers.1.mlp.up_proj.weight": torch.ones(1)}),
        r"of EAGLE-1: missing nothing, unexpected \['layers\.1\.mlp\.up_proj\.weight'\]",
    ),
    "no bias where one is promised": ("eagle 1", {}, lambda keys: keys.pop("fc.bias"), r"missing \['fc\.bias'\]"),
    "no bias of a query": (
        "eagle 2, of Qwen2",
        {},
        lambda keys: keys.pop("layers.0.self_attn.q_proj.bias"),
        r"missing \['layers\.0\.self_attn\.q_proj\.bias'\]",
    ),
    "no d2t": ("eagle 3", {}, lambda keys: keys.pop("d2t"), r"missing \['d2t'\], unexpected nothing"),
    "no norms of the features": (
        "eagle 3",
        {"fc_norm": True},
        len,
        r"missing \['fc_norm\.0\.weight', 'fc_norm\.1\.weight', 'fc_norm\.2\.weight'\]",
    ),
    "norms nobody asked for": ("normed before fc", {"eagle_config": {}}, len, r"unexpected \['input_norm\.weight'\]"),
    "another size": (
        "eagle 3",
        {"intermediate_size": 44},
        len,
        r"'midlayer\.mlp\.gate_proj\.weight' in '.*' has shape \[40, 48\], and .* need \[44, 48\]",
    ),
    "another number of states": (
        "eagle 3",
        {IDS: [1, 2]},
        len,
        r"'fc\.weight' in '.*' has shape \[48, 144\], and .* need \[48, 96\]",
    ),
    "another target's width": (
        "eagle 1",
        {"hidden_size": 64},
        len,
        "for a target of hidden size 64 and this one has 48",
    ),
    "another target's states": (
        "eagle 3",
        {"target_hidden_size": 64},
        len,
        "for a target of hidden size 64 and this one has 48",
    ),
    "a width of its own": (
        "eagle 3",
        {"target_hidden_size": 48, "hidden_size": 64},
        len,
        "has states of 64 numbers and this target 48",
    ),
    "another vocabulary": ("eagle 3", {"vocab_size": 99}, len, "for a target of vocabulary 99 and this one has 80"),
    "an embedding of its own": (
        "eagle 1",
        {},
        lambda keys: keys["embed_tokens.weight"][3].mul_(1.1),
        "is not this target's",
    ),
    "an embedding of another size": (
        "eagle 1",
        {},
        lambda keys: keys.update({"embed_tokens.weight": torch.zeros(81, 48)}),
        "is not this target's",
    ),
    "two layers of both names": (
        "eagle 3",
        {},
        lambda keys: keys.update({"layers.0.mlp.up_proj.weight": torch.zeros(40, 48)}),
        r"mixes layouts: it has midlayer\.\* and layers\.0\.\*, which",
    ),
    "the projection of version 1": (
        "eagle 3",
        {},
        lambda keys: keys.update({"fc.bias": torch.zeros(48)}),
        r"mixes layouts: it has d2t and fc\.bias, which",
    ),
    "a plain model": ("eagle 1", {}, lambda keys: keys.pop("fc.weight"), r"holds no EAGLE: its tensors have no fc\.w"),
    "no layer": (
        "eagle 1",
        {},
        lambda keys: [keys.pop(key) for key in list(keys) if key.startswith("layers")],
        "holds no EAGLE",
    ),
    "no number of heads": (
        "eagle 1",
        {"num_attention_heads": None, "intermediate_size": 0},
        len,
        r"says no num_attention_heads, no intermediate_size; fetch",
    ),
    "two layers": ("eagle 1", {"num_hidden_layers": 2}, len, "sets num_hidden_layers to 2 and only 1 is supported"),
    "another activation": ("eagle 3", {"hidden_act": "gelu"}, len, "sets hidden_act to 'gelu' and only 'silu'"),
    "one state": (
        "eagle 3",
        {"eagle_config": {"use_aux_hidden_state": False}},
        len,
        "sets use_aux_hidden_state to False",
    ),
    "parallel": ("eagle 3", {"mask_hidden": True}, len, "sets mask_hidden to True and only False is supported"),
    "yarn": (
        "eagle 3",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        len,
        r"asks for rotary positions \{.*'yarn'.*\}; default, linear and llama3 ones over whole heads are supported",
    ),
    "half a rotation": (
        "eagle 3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        len,
        "over whole heads are supported",
    ),
    "half a scaling": (
        "eagle 3",
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        len,
        "says no low_freq_factor of its 'llama3' rotary scaling",
    ),
    "another speculator": ("speculators", {"speculators_model_type": "dflash"}, len, "eagle3 alone can be used"),
    "both norms": ("eagle 3", {"fc_norm": True, "norm_before_fc": True}, len, "sets both fc_norm and norm_before_fc"),
    "a state too deep": ("eagle 3", {IDS: [0, 1, 4]}, len, "the state before layer 4 and this target has 3 layers"),
    "a token twice": (
        "eagle 3",
        {},
        lambda keys: keys.pop("t2d") is keys["d2t"][4:6].copy_(torch.tensor([9, 8])),
        "does not name tokens of this target of 80, each once",
    ),
    "a token too high": ("eagle 3", {}, lambda keys: keys["d2t"][29].fill_(51), "does not name tokens"),
    "a token below": ("eagle 3", {}, lambda keys: keys["d2t"][0].fill_(-1), "does not name tokens"),
    "t2d of another vocabulary": ("eagle 3", {}, lambda keys: keys["t2d"].logical_not_(), "does not name tokens"),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_what_is_wrong_with_a_checkpoint_is_said(spoilt: str, tmp_path: Path):
    key, config, change, words = SPOILT[spoilt]
    target, case = make("llama"), CASES[key]
    tensors = {k: v.clone() for k, v in tensors_of(case, target).items()}
    change(tensors)
    with pytest.raises(UserError, match=words) as error:
        loaded(tmp_path, case, target, tensors, **config)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_residual_that_nobody_told(tmp_path: Path):
    """speculators' own default and vLLM's for its format differ."""
    target, case = make("llama"), CASES["speculators"]
    silent = replace(case, config={k: v for k, v in case.config.items() if k != "norm_before_residual"})
    with pytest.raises(UserError, match="does not say norm_before_residual"):
        loaded(tmp_path, silent, target)


def test_folders_that_hold_none(tmp_path: Path):
    target, case = make("llama"), CASES["eagle 3"]

    def refused(words: str) -> None:
        with pytest.raises(UserError, match=words) as error:
            make_drafter(f"eagle:{tmp_path / 'here'}", target)
        assert "\n" not in str(error.value)

    looked_for = (
        r"no EAGLE at '.*here': neither drafter\.json .* nor config\.json with model\.safetensors or pytorch_model"
    )
    refused(looked_for)
    (tmp_path / "here").mkdir()
    refused(looked_for)
    (tmp_path / "here" / "config.json").write_text("{}")
    refused(looked_for)
    torch.save([1, 2], tmp_path / "here" / "pytorch_model.bin")
    refused("cannot be read .pytorch_model.bin holds something other than named tensors")
    (tmp_path / "here" / "pytorch_model.bin").write_bytes(pickle.dumps(Path("code"), protocol=2))
    refused("is no pickle of tensors alone, and code in it is not run")
    write(tmp_path / "here", case, tensors_of(case, target))
    whole = (tmp_path / "here" / "pytorch_model.bin").read_bytes()
    (tmp_path / "here" / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    refused("here' cannot be read")
    safe = replace(case, weights="model.safetensors")
    write(tmp_path / "here", safe, tensors_of(case, target))
    whole = (tmp_path / "here" / "model.safetensors").read_bytes()
    (tmp_path / "here" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused("here' cannot be read")
    for text in ("{", "[]", '{"eagle_config": 3}'):
        (tmp_path / "here" / "config.json").write_text(text)
        refused("here' cannot be read")
