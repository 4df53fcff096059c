"""Modules that models are published with: tiny checkpoints with the published keys decode as transformers' own modules,
or a forward written out here, say they do."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
import transformers as t
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, silu
from transformers.modeling_layers import MtpModel

import foretoken
from foretoken.decode import Request, Session
from foretoken.drafters import make_drafter, module_of
from foretoken.errors import UserError
from foretoken.generation import decode_all
from foretoken.native import LAYOUTS
from foretoken.rules import Match
from foretoken.sampling import Sampling
from foretoken.target import model_class_of
from tests import tiny
from tests.families import EXPERTS, HEADS, LATENT, make, quietly, randomise

L, H, D = 3, 48, 12
FULL: dict[str, Any] = {"layer_types": ["full_attention"] * L}
SHARED: dict[str, Any] = EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 32}
ERNIE: dict[str, Any] = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1}
CONFIGS: dict[str, Callable[[], t.PreTrainedConfig]] = {
    "deepseek_v3": lambda: t.DeepseekV3Config(
        **LATENT, **EXPERTS, n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1
    ),
    "glm4_moe": lambda: t.Glm4MoeConfig(**HEADS, **EXPERTS, n_routed_experts=12, first_k_dense_replace=1),
    "qwen3_next": lambda: t.Qwen3NextConfig(**HEADS, **SHARED, **FULL),
    "qwen3_5": lambda: t.Qwen3_5TextConfig(**HEADS, **FULL),
    "qwen3_5_moe": lambda: t.Qwen3_5MoeTextConfig(**HEADS, **SHARED, **FULL),
    "mimo": lambda: t.Qwen2Config(**HEADS),
    "ernie4_5": lambda: t.Ernie4_5Config(**HEADS),
    "ernie4_5_moe": lambda: t.Ernie4_5_MoeConfig(**HEADS, **ERNIE, moe_layer_start_index=1),
}
DEEPSEEK = ("{b}", "{b}enorm", "{b}hnorm", "{b}eh_proj", "{b}shared_head.norm")
QWEN = ("mtp.layers.{k}.", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm")
MIMO = ("{m}", "{m}token_layernorm", "{m}hidden_layernorm", "{m}input_proj", "{m}final_layernorm")
BAIDU = ("{e}block.{k}.", "{e}emb_norm.{k}", "{e}hidden_norm.{k}", "{e}linear_proj.{k}")
PARTS = {
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": DEEPSEEK,
    "qwen3_next": QWEN,
    "qwen3_5": QWEN,
    "qwen3_5_moe": QWEN,
    "mimo": MIMO,
    "ernie4_5": BAIDU,
    "ernie4_5_moe": BAIDU,
}
"""What the block's keys begin with; the two norms, the projection and, if it has one of its own, the final norm."""
COPIES = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
COUNT = {"qwen3_next": None, "qwen3_5": "mtp_num_hidden_layers", "qwen3_5_moe": "mtp_num_hidden_layers"}
"""Where the configuration says how many modules there are, if not as `num_nextn_predict_layers`."""
OWN = ("deepseek_v3", "glm4_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe")
"""Families whose modules transformers can run."""
REMOTE = {"model_type": "mimo", "architectures": ["MiMoForCausalLM"], "auto_map": {"AutoConfig": "no_such.MiMoConfig"}}

Keys = dict[str, Tensor]


@pytest.fixture(scope="module", autouse=True)
def full_attention_only() -> Iterator[None]:
    """Qwen3-Next and Qwen3.5 are refused because most of their layers are recurrent; the tiny ones here have none."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("qwen3_next", "qwen3_5", "qwen3_5_moe"):
            patch.setattr(model_class_of(CONFIGS[name]()), "_is_stateful", False)
        yield


def saved(name: str, seed: int) -> tuple[t.PreTrainedConfig, Keys]:
    """A random model as transformers writes it: one key per expert."""
    with quietly(), TemporaryDirectory() as folder:
        kind: Any = model_class_of(config := CONFIGS[name]())
        model = kind._from_config(config)
        randomise(model, seed)
        model.save_pretrained(folder)
        return model.config, load_file(Path(folder) / "model.safetensors")


def parts(name: str, k: int = 0) -> list[str]:
    """`PARTS` of module k."""
    return [p.format(k=k, b=f"model.layers.{L + k}.", m=f"model.mtp_layers.{k}.", e="model.mtp_") for p in PARTS[name]]


def module(name: str, k: int, main: Keys) -> Keys:
    """The published tensors of module k."""
    block, *others = parts(name, k)
    like = 0 if name == "ernie4_5_moe" else L - 1  # ERNIE's module is dense, as its first layers are
    before, (_, twin) = f"model.layers.{like}.", saved(name, 5 + k)
    tensors = {block + key.removeprefix(before): value for key, value in twin.items() if key.startswith(before)}
    draw = torch.Generator().manual_seed(k)
    centre = 0.0 if "qwen" in name else 1.0  # their norms add 1
    for part in others:
        if part == others[2]:
            tensors[f"{part}.weight"] = torch.randn(H, 2 * H, generator=draw) * 2 / math.sqrt(2 * H)
        else:
            tensors[f"{part}.weight"] = centre + 0.2 * torch.randn(H, generator=draw)
    for key in tensors:
        if key.endswith("e_score_correction_bias"):  # zero in a fresh model
            tensors[key] = 0.1 * torch.randn(tensors[key].shape, generator=draw)
    if PARTS[name] is DEEPSEEK:
        tensors |= {block + copy: main[key].clone() for copy, key in COPIES.items()}
    return tensors


def write(folder: Path, name: str, count: int = 1, change: Callable[[Keys], object] = len, files: int = 1) -> Path:
    """A checkpoint of the family with `count` modules, its tensors changed by `change`, in one file or several."""
    config, main = saved(name, 0)
    tensors = dict(main)
    for k in range(count):
        tensors |= module(name, k, main)
    if name.startswith("qwen3_5"):
        tensors = {key.replace("model.", "model.language_model.", 1): value for key, value in tensors.items()}
    change(tensors)
    given = config.to_dict() | {COUNT.get(name, "num_nextn_predict_layers"): count}
    given.pop(None, None)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(given | (REMOTE if name == "mimo" else {})))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    places = {key: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, key in enumerate(sorted(tensors))}
    for file in set(places.values()):
        save_file({k: v for k, v in tensors.items() if places[k] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def load(folder: Path) -> Any:
    target = foretoken.load(folder, dtype="float64", device="cpu")
    target.model.generation_config.eos_token_id = None  # outputs are compared up to their length
    return target


def native(target: Any, settings: dict[str, Any] | None = None) -> Any:
    """The drafter of the target's own modules."""
    return make_drafter("deepseek_mtp", target, settings)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """(folder, target) of a family, with one module or two; written once."""

    @cache
    def get(name: str, count: int = 1) -> tuple[Path, Any]:
        folder = write(tmp_path_factory.mktemp(name) / "model", name, count, files=2 if name == "glm4_moe" else 1)
        return folder, load(folder)

    return get


Forward = Callable[[int, Tensor, Tensor], Tensor]
"""(k, states [1, n, H], embeddings [1, n, H]) -> what module k makes of them, behind its final norm [1, n, H]."""


def transformers_own(folder: Path, name: str, count: int) -> Forward:
    """transformers' `MtpModel` on the same checkpoint; its positions are one on, which rotary attention cannot see."""
    with quietly():
        config = foretoken.loading.read_config(str(folder))
        if name.startswith("qwen"):
            config.num_mtp_layers, config.mtp_layer_types = count, ["full_attention"] * count
        kind: Any = model_class_of(config)
        model = kind.from_pretrained(
            folder, config=config, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
        )
        if not name.startswith("qwen"):
            model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{L + k}.*" for k in range(count)]
        modules = MtpModel.from_pretrained(model).double()

    def forward(k: int, states: Tensor, embedded: Tensor) -> Tensor:
        position = torch.arange(1, 1 + states.shape[1])[None]
        return modules.forward_layer(k, states, position, None, inputs_embeds=embedded)

    return forward


def plain(folder: Path, name: str) -> Forward:
    """The module of MiMo or ERNIE, written out over the published tensors."""
    tensors = {key: value.double() for key, value in load_file(folder / "model.safetensors").items()}
    block, enorm, hnorm, project, *final = parts(name)

    def norm(key: str, x: Tensor) -> Tensor:
        eps = foretoken.loading.read_config(str(folder)).rms_norm_eps
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * tensors[f"{key}.weight"]

    def project_by(key: str, x: Tensor) -> Tensor:
        return linear(x, tensors[f"{block}{key}.weight"], tensors.get(f"{block}{key}.bias"))

    def turned(x: Tensor) -> Tensor:
        """Rotary positions: MiMo turns halves against each other, ERNIE neighbours."""
        theta = foretoken.loading.read_config(str(folder)).rope_parameters["rope_theta"]
        angle = torch.arange(x.shape[1])[:, None, None] * theta ** -(torch.arange(D // 2) * 2.0 / D).double()
        a, b = (x[..., : D // 2], x[..., D // 2 :]) if name == "mimo" else (x[..., ::2], x[..., 1::2])
        pair = (a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin())
        return torch.cat(pair, -1) if name == "mimo" else torch.stack(pair, -1).flatten(-2)

    def forward(k: int, states: Tensor, embedded: Tensor) -> Tensor:
        halves = norm(enorm, embedded), norm(hnorm, states)
        x = linear(torch.cat(halves[::-1] if name == "mimo" else halves, -1), tensors[f"{project}.weight"])
        read = norm(f"{block}input_layernorm", x)
        q, key, v = (project_by(f"self_attn.{p}_proj", read).unflatten(-1, (-1, D)) for p in "qkv")
        q, key, v = turned(q), turned(key).repeat_interleave(2, 2), v.repeat_interleave(2, 2)
        scores = torch.einsum("bihd,bjhd->bhij", q, key) / math.sqrt(D)
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
        mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).flatten(2)
        x = x + project_by("self_attn.o_proj", mixed)
        read = norm(f"{block}post_attention_layernorm", x)
        x = x + project_by("mlp.down_proj", silu(project_by("mlp.gate_proj", read)) * project_by("mlp.up_proj", read))
        return norm(final[0] if final else "model.norm", x)

    return forward


class Watched:
    """A drafter that keeps the logits of every guess, with the text and the guesses that stood before it."""

    def __init__(self, drafter: Any) -> None:
        self.drafter, self.needs, self.seen = drafter, drafter.needs, []

    def start(self, batch: int, capacity: int) -> Any:
        return self.drafter.start(batch, capacity)

    def propose(self, feed: Any, state: Any) -> Any:
        logits, extend = self.drafter.begin(feed, state)
        self._keep(feed, feed.root[:, None], logits)

        def watching(growth: Any) -> Tensor:
            found = extend(growth)
            self._keep(feed, growth.tokens, found)
            return found

        return self.drafter.plan.draft(feed, logits, watching)

    def _keep(self, feed: Any, tokens: Tensor, logits: Tensor) -> None:
        for text, chain, row, count in zip(feed.texts, tokens.tolist(), logits, feed.count, strict=True):
            if count:  # a finished row commits nothing
                self.seen.append((list(text), chain[1:], row[-1]))


PROMPTS = [[5, 9, 12, 5, 9, 12, 5], [7, 3], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40], [8]]


def requests(temperature: float, tokens: int = 14) -> list[Request]:
    return [Request(p, Sampling(temperature=temperature, seed=4), i, tokens) for i, p in enumerate(PROMPTS)]


def guesses(target: Any, drafter: Any) -> list[tuple[list[int], list[int], Tensor]]:
    """(text, guesses, logits [V] of the next guess) of every step of a ragged, sampled batch."""
    session = Session(target, watched := Watched(drafter), requests(0.7, 8))
    while session.running:
        session.step()
    return watched.seen


def errors(target: Any, seen: list[tuple[list[int], list[int], Tensor]], forward: Forward, blank: bool = False) -> Any:
    """Largest difference of any logit from what `forward` says, per guess: guess k is module k's if there is one."""
    embedding, worst = target.model.get_input_embeddings().weight, dict[int, float]()
    for text, chain, logits in seen:
        with torch.inference_mode():
            tokens = torch.tensor(text)
            states = target.decoder(input_ids=tokens[None, :-1], use_cache=False).last_hidden_state
            output = forward_guess(forward, states, embedding, tokens[1:], chain, blank, target.config)
            want = target.unembed(output[0, -1])
        worst[len(chain)] = max(worst.get(len(chain), 0.0), float((want - logits).abs().max()))
    return worst


def forward_guess(
    forward: Forward, states: Tensor, embedding: Tensor, tokens: Tensor, chain: list[int], blank: bool, config: Any
) -> Tensor:
    """The output behind which the guess after `chain` is made, from the target's states [1, T, H]."""

    def embedded(tokens: Tensor) -> Tensor:
        found = embedding[tokens][None].clone()
        found[:, 0] *= not blank
        return found

    first, rows = states, states.shape[1]
    many = (getattr(config, "num_nextn_predict_layers", None) or 1) > 1
    output = forward(0, states, embedded(tokens))
    for k, token in enumerate(chain, 1):
        tokens = torch.cat([tokens, torch.tensor([token])])
        if many:  # module k reads what the one before made of the same rows, with the tokens one on
            output = forward(k, output, embedded(tokens[k : k + rows]))
        else:  # the one module reads one row more, its own state
            first = torch.cat([first, output[:, -1:]], 1)
            output = forward(0, first, embedded(tokens))
    return output


@pytest.mark.parametrize("name", CONFIGS)
def test_every_guess_is_the_published_modules(name: str, checkpoint: Any):
    """At every step of a ragged, sampled batch; as transformers' own where it has them."""
    folder, target = checkpoint(name)
    drafter = native(target)
    forward = transformers_own(folder, name, 1) if name in OWN else plain(folder, name)
    worst = errors(target, guesses(target, drafter), forward)
    assert set(worst) == {0, 1, 2}
    assert max(worst.values()) < 1e-4, worst


def test_two_modules_follow_each_other(checkpoint: Any):
    """As transformers runs them: the second reads the first's normed output; a third guess is the first module's."""
    folder, target = checkpoint("deepseek_v3", 2)
    drafter = native(target)
    assert (drafter.architecture.modules, drafter.architecture.guesses, drafter.architecture.attention) == (2, 2, "own")
    forward = transformers_own(folder, "deepseek_v3", 2)
    worst = errors(target, guesses(target, drafter), forward)
    assert set(worst) == {0, 1}
    assert max(worst.values()) < 1e-4, worst
    deeper = native(target, {"depth": "3"})
    worst = errors(target, guesses(target, deeper), lambda k, states, embedded: forward(k % 2, states, embedded))
    assert set(worst) == {0, 1, 2}
    assert max(worst.values()) < 1e-4, worst


def test_depth_goes_past_the_three_usual_guesses(checkpoint: Any):
    folder, target = checkpoint("mimo")
    worst = errors(target, guesses(target, native(target, {"depth": 5})), plain(folder, "mimo"))
    assert set(worst) == {0, 1, 2, 3, 4}
    assert max(worst.values()) < 1e-4, worst


@pytest.mark.parametrize(
    ("name", "setting", "wrong", "guess"),
    [
        ("deepseek_v3", "first", "state", 0),
        ("mimo", "first", "embedding", 0),
        ("ernie4_5_moe", "first", "state", 0),
        ("qwen3_5", "enters", "raw", 0),
        ("deepseek_v3", "onward", "raw", 1),
        ("mimo", "onward", "raw", 1),
        ("glm4_moe", "start", "blank", 0),
    ],
)
def test_every_setting_shows(name: str, setting: str, wrong: str, guess: int, checkpoint: Any):
    """The layouts' settings are what makes the guesses equal: with one of them wrong they are not."""
    folder, target = checkpoint(name)
    drafter = native(target)
    drafter.heads.architecture = replace(drafter.architecture, **{setting: wrong})
    broken = module_of("deepseek_mtp").DeepseekMtp(target, drafter.heads, drafter.plan)
    forward = transformers_own(folder, name, 1) if name in OWN else plain(folder, name)
    worst = errors(target, guesses(target, broken), forward)
    assert worst[guess] > 0.01
    assert guess == 0 or worst[0] < 1e-4  # what the first guess leaves behind shows in the second


def test_nothing_at_position_0_if_asked_for(checkpoint: Any):
    folder, target = checkpoint("glm4_moe")
    drafter = native(target, {"start": "blank"})
    seen = guesses(target, drafter)
    forward = transformers_own(folder, "glm4_moe", 1)
    worst = errors(target, seen, forward, blank=True)
    assert max(worst.values()) < 1e-4, worst
    assert errors(target, seen, forward)[0] > 0.01


@pytest.mark.parametrize("settings", [{}, {"tree": "beam", "width": 2}], ids=["chain", "tree"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_output_is_plain_decodings(name: str, temperature: float, settings: dict[str, Any], checkpoint: Any):
    _, target = checkpoint(name)
    want = decode_all(target, make_drafter("none", target), requests(temperature), Match())
    got = decode_all(target, native(target, settings), requests(temperature), Match())
    assert [row.output for row in got] == [row.output for row in want]
    if temperature:  # guesses drawn with the target's noise are right now and then, whatever the module's weights
        assert sum(sum(row.accepted) for row in got) > 3


def test_mimo_is_read_as_qwen2_without_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From folder to text, the tokenizer too, and nobody is asked whether to trust that code."""
    asked: list[str] = []

    def answer(question: str = "") -> str:
        asked.append(question)
        return "n"

    monkeypatch.setattr("builtins.input", answer)
    folder = write(tmp_path / "mimo", "mimo")
    letters = {letter: i for i, letter in enumerate(sorted("abcdefghijklmnopqrstuvwxyz" + "\u0120"))}  # its space
    none: dict[str, Any] = dict.fromkeys(("unk_token", "eos_token", "pad_token"))
    t.Qwen2Tokenizer(vocab=letters, merges=[], **none).save_pretrained(folder)
    target = foretoken.load(folder, device="cpu")
    assert type(target.model) is t.Qwen2ForCausalLM
    assert not asked
    prompts = ["once upon", "a"]
    plain, drafted = (
        foretoken.generate(target, prompts, drafter=name, max_new_tokens=12) for name in ("none", "deepseek_mtp")
    )
    assert [o.text for o in drafted] == [o.text for o in plain]
    assert all(o.text for o in plain)


def test_experts_may_be_stored_fused(tmp_path: Path, checkpoint: Any):
    """As Qwen3.5's layers are published; the modules are the same."""

    def fuse(tensors: Keys) -> None:
        at = "mtp.layers.0.mlp.experts."
        each = [[tensors.pop(f"{at}{i}.{p}_proj.weight") for p in ("gate", "up", "down")] for i in range(4)]
        tensors[f"{at}gate_up_proj"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in each])
        tensors[f"{at}down_proj"] = torch.stack([down for _, _, down in each])

    fused = native(load(write(tmp_path / "fused", "qwen3_5_moe", change=fuse)))
    apart = native(checkpoint("qwen3_5_moe")[1])
    for name, tensor in apart.heads.state_dict().items():
        assert torch.equal(tensor, fused.heads.state_dict()[name]), name


def test_weights_keep_the_precision_that_the_target_gives_them(tmp_path: Path):
    """Half precision for all but the experts' correction, which decides between them by small differences."""
    folder = write(tmp_path / "half", "deepseek_v3")
    target = foretoken.load(folder, dtype="bfloat16", device="cpu")
    state = native(target).heads.state_dict()
    stored = load_file(folder / "model.safetensors")
    correction = "mlp.gate.e_score_correction_bias"
    assert state[f"layers.0.block.{correction}"].dtype == torch.float32
    assert torch.equal(state[f"layers.0.block.{correction}"], stored[f"model.layers.3.{correction}"])
    for name in ("eh_proj.weight", "enorm.weight", "block.self_attn.o_proj.weight"):
        key = f"model.layers.3.{name.removeprefix('block.')}"
        assert torch.equal(state[f"layers.0.{name}"], stored[key].bfloat16())


B = "model.layers.3."


def elsewhere(keys: Keys) -> None:
    """ERNIE's module called as MiMo calls its own."""
    for key in [key for key in keys if ".mtp_" in key]:
        keys[key.replace("mtp_block", "mtp_layers").replace("mtp_linear_proj.0", "mtp_layers.0.input_proj")] = keys.pop(
            key
        )
    del keys["model.mtp_emb_norm.0.weight"], keys["model.mtp_hidden_norm.0.weight"]


SPOILT: dict[str, tuple[str, Callable[[Keys], object], str]] = {
    "no modules": (
        "deepseek_v3",
        lambda keys: [keys.pop(key) for key in list(keys) if key.startswith(B)],
        "holds no modules of its own",
    ),
    "a part missing": (
        "deepseek_v3",
        lambda keys: keys.pop(f"{B}hnorm.weight"),
        r"missing \['model\.layers\.3\.hnorm\.weight'\], unexpected nothing",
    ),
    "a block's tensor missing": (
        "mimo",
        lambda keys: keys.pop("model.mtp_layers.0.self_attn.k_proj.bias"),
        r"missing \['model\.mtp_layers\.0\.self_attn\.k_proj\.bias'\]",
    ),
    "an expert missing": (
        "glm4_moe",
        lambda keys: keys.pop(f"{B}mlp.experts.10.up_proj.weight"),
        r"missing \['model\.layers\.3\.mlp\.experts\.10\.up_proj\.weight'\], unexpected nothing",
    ),
    "an expert more": (
        "glm4_moe",
        lambda keys: keys.update({f"{B}mlp.experts.12.up_proj.weight": torch.zeros(32, H)}),
        r"missing nothing, unexpected \['model\.layers\.3\.mlp\.experts\.12\.up_proj\.weight'\]",
    ),
    "quantised": (
        "deepseek_v3",
        lambda keys: keys.update({f"{B}self_attn.o_proj.weight_scale_inv": torch.zeros(1)}),
        r"unexpected \['model\.layers\.3\.self_attn\.o_proj\.weight_scale_inv'\]",
    ),
    "a name unknown": (
        "qwen3_next",
        lambda keys: keys.update({"mtp.fd.weight": keys.pop("mtp.fc.weight")}),
        r"missing \['mtp\.fc\.weight'\], unexpected \['mtp\.fd\.weight'\]",
    ),
    "two layouts": (
        "deepseek_v3",
        lambda keys: keys.update({"mtp.fc.weight": torch.zeros(H, 2 * H)}),
        "the layout of DeepSeek and Qwen, and a model of type 'deepseek_v3' has DeepSeek's",
    ),
    "another layout": (
        "ernie4_5_moe",
        lambda keys: keys.update(
            {k.replace("mtp_block", "mtp_layers"): keys.pop(k) for k in list(keys) if "mtp_" in k}
        ),
        "has ERNIE's",
    ),
    "another size": (
        "ernie4_5",
        lambda keys: keys.update({"model.mtp_linear_proj.0.weight": torch.zeros(H, H)}),
        r"'model\.mtp_linear_proj\.0\.weight' in .* has shape \[48, 48\] and this target needs \[48, 96\]",
    ),
    "an expert of another size": (
        "glm4_moe",
        lambda keys: keys.update({f"{B}mlp.experts.3.down_proj.weight": torch.zeros(H, 16)}),
        r"experts\.0\.down_proj\.weight' and the tensors beside it in .* are of sizes that do not fit",
    ),
    "an embedding of its own": (
        "deepseek_v3",
        lambda keys: keys[f"{B}embed_tokens.weight"][3].mul_(1.1),
        r"'model\.layers\.3\.embed_tokens\.weight' in .* is not the target's token embedding",
    ),
    "an output head of its own": (
        "glm4_moe",
        lambda keys: keys[f"{B}shared_head.head.weight"][79].mul_(1.1),
        r"'model\.layers\.3\.shared_head\.head\.weight' in .* is not the target's output head",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_wrong_with_a_checkpoint_is_said(case: str, tmp_path: Path):
    name, change, words = SPOILT[case]
    target = load(write(tmp_path / "spoilt", name, change=change))
    with pytest.raises(UserError, match=words):
        native(target)


def test_fewer_modules_than_the_configuration_says(tmp_path: Path):
    folder = write(tmp_path / "few", "deepseek_v3", 2)
    kept = {k: v for k, v in load_file(folder / "model.safetensors").items() if not k.startswith("model.layers.4.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"missing \['model\.layers\.4\.enorm\.weight', .*unexpected nothing"):
        native(load(folder))


def test_targets_without_modules_that_we_know(tmp_path: Path, checkpoint: Any):
    with pytest.raises(UserError, match=r"known for deepseek_v3, .*, qwen3_next and this target is 'llama'"):
        native(make("llama"))
    with pytest.raises(UserError, match="was not loaded from a checkpoint"):
        native(make("glm4_moe"))
    with pytest.raises(UserError, match="'never' is no start of deepseek_mtp"):
        native(checkpoint("mimo")[1], {"start": "never"})
    folder = write(tmp_path / "cut", "mimo")
    target = load(folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        native(target)


def test_every_layout_is_tested():
    assert {family for layout in LAYOUTS.values() for family in layout.families} - {"mimo"} == {
        CONFIGS[name]().model_type for name in CONFIGS
    }


def test_native_modules_can_be_trained_on(tmp_path: Path, checkpoint: Any):
    """FastMTP's case: the published module learns to feed itself, from the weights it came with, and is saved."""
    folder = shutil.copytree(checkpoint("mimo")[0], tmp_path / "model")
    tiny.tokenizer().save_pretrained(folder)
    tiny.counting(tmp_path / "counting.txt")
    shared: dict[str, Any] = {"target": folder, "drafter": "deepseek_mtp", "resume_from": "native", "steps": 2}
    shared |= {"data__source": tmp_path / "counting.txt", "architecture": {"guesses": 2}}
    target = load(folder)
    before = make_drafter("deepseek_mtp", target).heads.state_dict()
    for rate, moved in ((1e-12, False), (1e-2, True)):
        out, _ = tiny.trained(tiny.recipe(tmp_path, out=tmp_path / str(rate), optimizer__lr=rate, **shared))
        trained = make_drafter(f"deepseek_mtp:{out}", target).heads
        assert (trained.architecture.guesses, trained.architecture.first) == (2, "state")
        assert trained.state_dict().keys() == before.keys()
        near = all(torch.allclose(value, before[name], atol=1e-6) for name, value in trained.state_dict().items())
        assert near != moved


@pytest.mark.parametrize(
    ("name", "drafter", "said"),
    [
        ("mimo", "medusa", "No model is published with weights of medusa"),
        ("ernie4_5_moe", "deepseek_mtp", "of another kind than its last block"),
    ],
)
def test_what_cannot_be_trained_on(name: str, drafter: str, said: str, tmp_path: Path, checkpoint: Any):
    tiny.counting(tmp_path / "counting.txt")
    folder = shutil.copytree(checkpoint(name)[0], tmp_path / "model")
    tiny.tokenizer().save_pretrained(folder)
    shared: dict[str, Any] = {"target": folder, "data__source": tmp_path / "counting.txt", "precision": "float32"}
    recipe = tiny.recipe(tmp_path, drafter=drafter, resume_from="native", **shared)
    with pytest.raises(UserError, match=said):
        tiny.trained(recipe)
