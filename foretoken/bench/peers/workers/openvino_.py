"""OpenVINO GenAI: its continuous batching, its prompt lookup and its speculative decoding with a draft model.

The model is converted by optimum-intel, once, and kept as float32; the pipeline makes weights, cache and products the
type that was asked for. Nothing is quantised.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import openvino  # pyright: ignore[reportMissingImports]
import openvino_genai as genai  # pyright: ignore[reportMissingImports]
from protocol import SIZES, Answer, Group, Load, Refusal, Tally, parameters, serve

HINTS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVino:
    """A pipeline on the processor."""

    def __init__(self, load: Load) -> None:
        self.settings, self.method = load.settings, load.method
        if load.dtype == "bfloat16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Refusal(
                "OpenVINO computes bfloat16 only on processors with products of it, and this one has none; "
                "leave openvino out, or compare in float32."
            )
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = 1  # GB
        scheduler.enable_prefix_caching = False  # each prompt is read, however often it came
        scheduler.max_num_seqs = load.batch
        scheduler.max_num_batched_tokens = max(load.most * load.batch, 256)
        properties: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": HINTS[load.dtype],
            "KV_CACHE_PRECISION": HINTS[load.dtype],
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
            "INFERENCE_NUM_THREADS": load.threads,
        }
        more: dict[str, Any] = {}
        if load.method == "prompt_lookup":
            more["prompt_lookup"] = True
        if load.draft is not None and load.draft_files is not None:
            draft = converted(load.draft, load.draft_files)
            more["draft_model"] = genai.draft_model(str(draft), "CPU", **properties)
        folder = converted(load.model, load.files)
        self.pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", {**properties, **more})
        self.facts = {
            "openvino_genai": genai.__version__,
            "openvino": openvino.__version__,
            **{key.lower(): value for key, value in properties.items()},
            "weights_bytes": SIZES[load.dtype] * parameters(load.model),
            "extra_parameters": parameters(load.draft) if load.draft else 0,
            "batched": True,
            # Sampled with a draft model, its tokens are 1.3 nats less likely under the model than the model's own
            # (2026.4.1, 60 samples of 40 tokens); greedy ones are the same.
            "exact": load.draft is None,
        }

    def run(self, group: Group) -> Answer:
        config = self.config(group)
        began = perf_counter()
        handles = [
            self.pipeline.add_request(row, openvino.Tensor([prompt]), config)
            for row, prompt in enumerate(group.prompts)
        ]
        tokens: list[list[int]] = [[] for _ in handles]
        tally, first, forwards = Tally(), 0.0, 0
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            forwards += bool(first)
            for row, handle in enumerate(handles):
                while handle.can_read():
                    new = next(iter(handle.read().values())).generated_ids
                    tokens[row] += new
                    tally.add(len(new))
            if not first and all(tokens):
                first = perf_counter() - began
        seconds = perf_counter() - began
        return Answer(tokens, seconds, first, forwards, None if self.method == "plain" else tally.accepted)

    def config(self, group: Group) -> Any:
        config = genai.GenerationConfig()
        config.max_new_tokens = group.max_new_tokens
        config.do_sample = group.temperature > 0
        config.temperature = group.temperature or 1.0
        config.top_p, config.rng_seed = 1.0, group.seed
        config.ignore_eos = not group.eos
        if group.eos:
            config.stop_token_ids = set(group.eos)
        if self.method == "prompt_lookup":
            config.num_assistant_tokens = self.settings["length"]
            config.max_ngram_size = self.settings["ngram"]
        if self.method == "draft_model":
            config.num_assistant_tokens = self.settings["depth"]
        return config


def converted(model: str, files: str) -> Path:
    """The model as OpenVINO reads it, in a folder beside what else was made of it."""
    folder = Path(files) / "openvino"
    if not folder.exists():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        tool = Path(sys.executable).with_name("optimum-cli")
        options = ["--task", "text-generation-with-past", "--weight-format", "fp32"]
        done = subprocess.run(
            [tool, "export", "openvino", "-m", model, *options, part], capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stdout, done.stderr, file=sys.stderr)
            last = (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]
            raise Refusal(f"OpenVINO cannot convert the model in {model!r} ({last}); leave openvino out for it.")
        part.rename(folder)
    return folder


if __name__ == "__main__":
    serve(OpenVino)
