"""The problems to evaluate on, and how to sample on each: eval.benchmarks, and the data sources in data.eval."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_gppo.config import BenchmarkConfig, ColumnsConfig, Config, ConfigError, SamplingConfig
from megatron_gppo.data import PromptSet, load_prompts
from megatron_gppo.datatypes import Prompt


@dataclass(frozen=True, slots=True)
class Benchmark:
    """Problems that are scored together."""

    name: str
    sampling: SamplingConfig
    samples: int  # k: responses per problem
    prompts: list[Prompt]
    questions: list[str]  # of prompts, without template, system prompt and suffix
    left_out: Mapping[str, int]  # rows that are no problems of it, by reason; of all of data.eval together

    @property
    def keys(self) -> list[str]:
        """What identifies each problem in any report, whatever template or suffix a model got it with."""
        return [
            hashlib.sha256(f"{question}\0{prompt.ground_truth}".encode()).hexdigest()[:16]
            for question, prompt in zip(self.questions, self.prompts, strict=True)
        ]

    @property
    def settings(self) -> dict[str, Any]:
        """All that its records depend on, beside the model and the reward."""
        prompts = hashlib.sha256("\0".join(f"{p.row} {p.text}\0{p.ground_truth}" for p in self.prompts).encode())
        return {**self.sampling.model_dump(), "samples": self.samples, "prompts": prompts.hexdigest()}


def load_benchmarks(
    config: Config, tokenizer: PreTrainedTokenizerBase, max_position_embeddings: int
) -> list[Benchmark]:
    """All benchmarks of a configuration, those of eval.benchmarks first.

    Raises DataError, and ConfigError when there are none or when the model cannot hold what they ask for.
    """
    benchmarks = [_named(config, name, benchmark, tokenizer) for name, benchmark in config.eval.benchmarks.items()]
    if config.data.eval:
        benchmarks += _by_data_source(config, load_prompts(config.data, tokenizer, "eval"))
    if not benchmarks:
        raise ConfigError("there is nothing to evaluate on. Fix: set eval.benchmarks or data.eval")
    names = [benchmark.name for benchmark in benchmarks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"{', '.join(repeated)}: a name in eval.benchmarks and a data_source in data.eval. Fix: rename the benchmark"
        )
    for benchmark in benchmarks:
        longest = config.data.max_prompt_tokens + benchmark.sampling.max_response_tokens
        if longest > max_position_embeddings:
            raise ConfigError(
                f"benchmark {benchmark.name}: data.max_prompt_tokens + max_response_tokens = {config.data.max_prompt_tokens} + "
                f"{benchmark.sampling.max_response_tokens} = {longest} tokens, more than max_position_embeddings = "
                f"{max_position_embeddings} of the model. Fix: lower either"
            )
    return benchmarks


def _named(config: Config, name: str, own: BenchmarkConfig, tokenizer: PreTrainedTokenizerBase) -> Benchmark:
    # data's columns are those of the training rows, and say nothing about these.
    changes: dict[str, Any] = {"eval": [own], **dict.fromkeys(ColumnsConfig.model_fields)}
    changes |= {key: getattr(own, key) for key in ("system_prompt", "prompt_suffix") if getattr(own, key) is not None}
    loaded = load_prompts(config.data.model_copy(update=changes), tokenizer, "eval", f"eval.benchmarks.{name}")
    general = config.eval
    sampling = SamplingConfig(
        temperature=own.temperature or general.temperature,
        top_p=own.top_p or general.top_p,
        max_response_tokens=own.max_response_tokens or general.max_response_tokens,
    )
    questions = [origin.question for origin in loaded.origins]
    return Benchmark(name, sampling, own.samples or general.samples, loaded.prompts, questions, loaded.dropped)


def _by_data_source(config: Config, loaded: PromptSet) -> list[Benchmark]:
    general = config.eval
    sampling = SamplingConfig(
        temperature=general.temperature, top_p=general.top_p, max_response_tokens=general.max_response_tokens
    )
    indices: dict[str, list[int]] = defaultdict(list)
    for index, prompt in enumerate(loaded.prompts):
        indices[prompt.data_source].append(index)
    return [
        Benchmark(
            name,
            sampling,
            general.samples,
            [loaded.prompts[index] for index in of_one],
            [loaded.origins[index].question for index in of_one],
            loaded.dropped,
        )
        for name, of_one in sorted(indices.items())
    ]
