"""The configuration: one typed, documented tree, read from YAML with dotted overrides.

Every field says what it means and its bounds; unknown keys, values out of range and combinations that cannot work
raise ConfigError, which names the field, the value and the fix, before any GPU or file is touched.
"""

import difflib
import math
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from megatron_gppo.schedules import NUMBER, NUMBER_OR_SCHEDULE, SCHEDULE, Schedule, value_at

Probability = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=1e-6, allow_inf_nan=False)]  # below, SGLang takes the likeliest token instead
Below1 = Annotated[float, Field(ge=0.0, lt=1.0)]
# Numbers of these kinds, or schedules of them over steps.
ScheduledPositive = Annotated[
    Annotated[PositiveFloat, Tag(NUMBER)] | Annotated[Schedule[PositiveFloat], Tag(SCHEDULE)], NUMBER_OR_SCHEDULE
]
ScheduledNonNegative = Annotated[
    Annotated[NonNegativeFloat, Tag(NUMBER)] | Annotated[Schedule[NonNegativeFloat], Tag(SCHEDULE)], NUMBER_OR_SCHEDULE
]
ScheduledBelow1 = Annotated[
    Annotated[Below1, Tag(NUMBER)] | Annotated[Schedule[Below1], Tag(SCHEDULE)], NUMBER_OR_SCHEDULE
]

Objective = Literal["ce_gppo", "ppo_clip", "dapo", "cispo", "gspo"]
Aggregation = Literal["token_mean", "group_token_mean", "seq_mean_token_mean", "seq_mean_token_sum_norm"]
PauseMode = Literal["abort", "retract", "in_place"]
Advantage = Literal["mean_std", "mean", "leave_one_out"]


class ConfigError(ValueError):
    """A mistake in the user's configuration. The message names field, value and fix, a line each."""


class Section(BaseModel):
    """A part of the configuration: immutable, and strict about names."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, validate_default=True, serialize_by_alias=True
    )


class ModelConfig(Section):
    """The policy's starting point."""

    hf_path: Path
    """Folder of the HF model: config.json and tokenizer are always read from here, and the engines start from it."""
    checkpoint: Path | None = None
    """Folder written by tools/convert_hf_to_megatron.py. None converts hf_path into run.dir at the start."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Of the policy's weights and activations; bf16 keeps fp32 master weights in the optimizer."""


class ParallelConfig(Section):
    """How the policy is cut over ranks. Data parallel takes what is left: world size / (tp * pp * cp)."""

    tp: PositiveInt = 1
    """Tensor-parallel size."""
    pp: PositiveInt = 1
    """Pipeline-parallel size."""
    vpp: PositiveInt | None = None
    """Model chunks per pipeline rank (interleaved 1F1B). None is plain 1F1B."""
    cp: PositiveInt = 1
    """Context-parallel size: every sequence is cut over so many ranks, for responses whose activations one cannot hold."""
    ep: PositiveInt = 1
    """Expert-parallel size, for models with experts. It takes no ranks of its own: a pipeline stage's ranks share out the experts."""
    sequence_parallel: bool = False
    """Shard the activations between tensor-parallel regions along the sequence; needs tp > 1."""

    @model_validator(mode="after")
    def _combinations(self) -> "ParallelConfig":
        if self.sequence_parallel and self.tp == 1:
            raise ValueError("sequence_parallel = true needs tp > 1. Fix: set parallel.sequence_parallel=false")
        if self.vpp is not None and self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp = {self.vpp} needs pp > 1. Fix: remove parallel.vpp or raise parallel.pp")
        return self

    @property
    def sequence_alignment(self) -> int:
        """Packed sequences are padded to a multiple of this: context parallelism cuts each into 2 * cp equal chunks."""
        return 2 * self.cp if self.cp > 1 else 1

    @property
    def row_alignment(self) -> int:
        """Packed rows are padded to a multiple of this: sequence parallelism cuts each cp rank's part over tp ranks."""
        return math.lcm(self.sequence_alignment, self.cp * (self.tp if self.sequence_parallel else 1))


class ColumnsConfig(Section):
    """Where a row holds its prompt and answer. What is not set is recognised from the rows (megatron_gppo.data.schema)."""

    prompt_column: str | None = None
    """A list of {role, content} messages. Dotted names reach into objects, here and below."""
    question_column: str | None = None
    """The question as text, instead of prompt_column."""
    answer_column: str | None = None
    """The ground truth; of text with GSM8K's "#### 42" what follows the mark."""
    id_column: str | None = None
    """The row's id, which no other row of the same source may have."""

    @model_validator(mode="after")
    def _columns(self) -> "ColumnsConfig":
        if self.prompt_column is not None and self.question_column is not None:
            raise ValueError(
                f"prompt_column = {self.prompt_column} and question_column = {self.question_column} exclude each other. Fix: "
                "set prompt_column for lists of messages, question_column for text"
            )
        if self.prompt_column is None and (self.question_column is None) != (self.answer_column is None):
            raise ValueError(
                "question_column and answer_column go together. Fix: set both, e.g. data.question_column and data.answer_column, or neither"
            )
        return self


class SourceConfig(ColumnsConfig):
    """Rows from one place. In YAML a path alone, as text, is enough."""

    path: str | None = None
    """A .jsonl, .json, .parquet or .arrow file, a folder of them (Dataset.save_to_disk's, too), or a glob."""
    hub: str | None = None
    """Instead of path: a data set on the Hugging Face hub, e.g. HuggingFaceH4/MATH-500. Rows are streamed."""
    subset: str | None = None
    """hub: which of the data set's configurations."""
    split: str | None = None
    """hub: which split (default: train). Folders: read only the files whose name or folder is this split."""
    name: str | None = None
    """data_source of rows that have none. None is the file's or data set's name."""
    weight: PositiveFloat | None = None
    """data.train: this source's share of the prompts, relative to the others' weights. None everywhere: every row once an epoch."""

    @model_validator(mode="after")
    def _place(self) -> "SourceConfig":
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"path = {self.path}, hub = {self.hub}. Fix: set one of them")
        if self.subset is not None and self.hub is None:
            raise ValueError(f"subset = {self.subset} is for hub. Fix: remove it, or name a folder in path")
        return self

    @property
    def label(self) -> str:
        """How messages name it."""
        return self.path if self.path is not None else f"hub {self.hub}"


def _as_sources(value: Any) -> Any:
    """Paths as text, and one source instead of a list of one, as YAML may have them."""
    items = value if isinstance(value, list) else [] if value is None else [value]
    for item in items:
        if not isinstance(item, str | Path | dict | SourceConfig):
            raise ValueError(f"{item!r} is not a path. Fix: give a path, or fields such as {{path: FILE, weight: 2}}")
    return [{"path": str(item)} if isinstance(item, str | Path) else item for item in items]


Sources = Annotated[list[SourceConfig], BeforeValidator(_as_sources)]


class DataConfig(ColumnsConfig):
    """Prompts for training and evaluation. Columns set here are those of every source in train and eval that sets none."""

    train: Sources = []
    """Sources of the training prompts; needed unless rollouts are replayed."""
    eval: Sources = []
    """Sources of evaluation problems; each data_source in them becomes a benchmark. Others: eval.benchmarks."""
    system_prompt: str | None = None
    """A system message put before each prompt."""
    prompt_suffix: str | None = None
    """Text put after the last user message, unless the message ends with it, e.g. the instruction to answer in \\boxed{}."""
    max_prompt_tokens: PositiveInt = 4096
    """Longer prompts are dropped or cut, and counted."""
    long_prompts: Literal["drop", "truncate_left"] = "drop"
    """What becomes of longer prompts: truncate_left keeps their last max_prompt_tokens tokens."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A row that cannot be used is an error, or is left out and counted."""
    decontamination_ngram: Annotated[int, Field(ge=2)] | None = None
    """Drop training prompts that share this many words in a row with an evaluation problem (9 in the paper). None: keep all."""
    shuffle: bool = True
    """Shuffle every epoch anew, with run.seed."""

    @model_validator(mode="after")
    def _weights(self) -> "DataConfig":
        weights = [source.weight for source in self.train]
        if None in weights and any(weight is not None for weight in weights):
            raise ValueError(f"train: weights = {weights}. Fix: give every source of data.train a weight, or none")
        if any(source.weight is not None for source in self.eval):
            raise ValueError("eval: a weight has no meaning there. Fix: remove it from data.eval")
        return self


class SamplingConfig(Section):
    """One definition of sampling, for the engine and for the log-probs of the loss."""

    temperature: Temperature = 1.0
    """Logits are divided by this, in the engine and in every log-prob the trainer computes."""
    top_p: Probability = 1.0
    """Nucleus sampling. Log-probs are of the whole distribution, so below 1 engine and policy agree on fewer tokens."""
    max_response_tokens: PositiveInt = 16384
    """Generation stops there; the response then counts as truncated."""


ServerArgs = dict[str, str | int | float | bool | list[str | int | float]]


class EngineConfig(Section):
    """Some managed engines that are alike."""

    count: PositiveInt = 1
    """So many, on each of the nodes."""
    nodes: list[Annotated[int, Field(ge=0)]] | Literal["all"] = [0]
    """Where, as torchrun counts its nodes."""
    tp: PositiveInt | None = None
    """Tensor-parallel size. None is rollout.engine_tp."""
    gpus: list[Annotated[int, Field(ge=0)]] | None = None
    """CUDA devices of each node, tp for each engine in turn. None takes them from the first that the policy's ranks and
    the entries before leave free (colocated: from the first)."""
    cores: list[Annotated[int, Field(ge=0)]] | None = None
    """CPU cores of each node, shared out evenly; the engine's processes run nowhere else. None: the system decides."""
    server_args: ServerArgs = {}
    """Put on top of rollout.server_args."""


class RolloutConfig(SamplingConfig):
    """Generation of responses."""

    mode: Literal["managed", "external", "replay"] = "managed"
    """managed: start SGLang here; external: use the servers at urls; replay: read recorded rollouts, no engine."""
    engines: list[EngineConfig] = []
    """managed: the engines to start. None given: one, on the first node."""
    urls: list[str] = []
    """external: base URLs of running SGLang servers, e.g. http://10.0.0.5:30000; managed: more engines beside rollout.engines."""
    placement: Literal["disaggregated", "colocated"] = "disaggregated"
    """disaggregated: engines have GPUs of their own; colocated: they share the policy's, and give their memory back while it
    trains."""
    router: bool = False
    """Several engines: send prompts through sglang-router, which prefers the engine that has a prompt's beginning in its cache."""
    max_restarts: Annotated[int, Field(ge=0)] = 5
    """Times that each engine which died, hung or answered nonsense is started again in a run, or, external, waited for."""
    health_timeout_s: PositiveFloat = 120.0
    """An engine that is working, but whose health check does not succeed for so long, is taken for hung."""
    replay: Path | None = None
    """replay: folder that an earlier run recorded."""
    record: Path | None = None
    """Folder to record every step's rollout into."""
    prompts_per_step: PositiveInt = 128
    """Groups in one step's batch."""
    responses_per_prompt: Annotated[int, Field(ge=2)] = 8
    """G, the size of a group."""
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal and generate others in their place."""
    max_refills: PositiveInt = 4
    """dynamic_sampling: rounds of replacement before the step goes on with fewer groups (counted)."""
    oversample: Annotated[float, Field(ge=1.0, le=8.0)] = 1.0
    """dynamic_sampling: generate so many times the groups at once, and abort what is left when there are enough. Prompts of
    aborted groups come first in the next step. Favours prompts with short responses."""
    concurrency: PositiveInt = 256
    """Groups in flight to each server; one request asks for a prompt's G responses. An evaluation has as many responses in flight."""
    request_timeout_s: PositiveFloat = 1800.0
    """Limit for one request, generation included."""
    max_retries: Annotated[int, Field(ge=0)] = 3
    """Times a request that failed is sent again to its engine, before that counts as lost; and times that it is moved to
    another, before the step fails."""
    host: str = "127.0.0.1"
    """managed: address the servers listen on. Their control endpoints execute what they are sent: see api_key. With engines
    on several nodes it has to be 0.0.0.0 (or ::), and each node gives the address from which it reaches the first."""
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """managed: port of a node's first server; the others count up. None takes free ones."""
    api_key: str | None = None
    """Sent to, and demanded by, the servers. Needed when host is not a loopback address."""
    engine_tp: PositiveInt = 1
    """managed: the servers' tensor-parallel size."""
    engine_dtype: Literal["bf16", "fp32"] | None = None
    """managed: dtype of the server's weights. None is model.dtype."""
    start_timeout_s: PositiveFloat = 600.0
    """managed: limit for a server to come up."""
    server_args: ServerArgs = {}
    """managed: further arguments of sglang.launch_server, as {mem_fraction_static: 0.8}."""
    logprob_alarm: PositiveFloat = 1.0
    """Warn, and keep the sample, when an engine log-prob differs from the policy's by more than this on average (nats per token)."""

    @property
    def responses_at_once(self) -> int:
        """In flight to each server."""
        return self.concurrency * self.responses_per_prompt

    @model_validator(mode="after")
    def _modes(self) -> "RolloutConfig":
        if (self.mode == "external" and not self.urls) or (self.mode == "replay" and self.urls):
            raise ValueError(
                f"urls = {self.urls} with mode = {self.mode}. Fix: mode external takes one or more rollout.urls, replay none"
            )
        if self.mode == "managed" and self.urls and not self.engines:
            raise ValueError(
                f"urls = {self.urls} with mode = managed. Fix: set rollout.mode: external, or list in rollout.engines what to start beside them"
            )
        if self.mode != "managed" and self.engines:
            raise ValueError(
                f"engines with mode = {self.mode}. Fix: remove rollout.engines, or set rollout.mode: managed"
            )
        if (self.mode == "replay") != (self.replay is not None):
            raise ValueError(
                f"replay = {self.replay} with mode = {self.mode}. Fix: mode replay takes the folder rollout.replay, the others none"
            )
        if self.mode == "replay" and self.record is not None:
            raise ValueError(f"record = {self.record} with mode = replay. Fix: remove rollout.record")
        if self.mode == "managed" and self.host not in ("127.0.0.1", "localhost", "::1") and self.api_key is None:
            raise ValueError(
                f"host = {self.host} opens the engine's control endpoints to the network. Fix: set rollout.api_key"
            )
        if self.oversample > 1 and not self.dynamic_sampling:
            raise ValueError(
                f"oversample = {self.oversample} is for dynamic sampling. Fix: set rollout.dynamic_sampling: true, or remove it"
            )
        return self

    @model_validator(mode="after")
    def _engines(self) -> "RolloutConfig":
        for index, entry in enumerate(self.engines):
            ranks = entry.count * (entry.tp or self.engine_tp)
            if entry.gpus is not None and len(entry.gpus) != ranks:
                raise ValueError(
                    f"engines.{index}.gpus = {entry.gpus}: {entry.count} engines of tp {entry.tp or self.engine_tp} need {ranks}. Fix: list so many"
                )
            if entry.cores is not None and (not entry.cores or len(entry.cores) % ranks):
                raise ValueError(
                    f"engines.{index}.cores = {entry.cores} cannot be shared out evenly over {ranks} = count x tp processes. Fix: list a multiple"
                )
            if entry.nodes != [0] and self.host not in ("0.0.0.0", "::"):
                raise ValueError(
                    f"engines.{index}.nodes = {entry.nodes}, but host = {self.host} is one machine's. Fix: set rollout.host: 0.0.0.0 and rollout.api_key"
                )
            for field in ("gpus", "cores"):
                self._check_used_once(index, field)
        return self

    def _check_used_once(self, index: int, field: str) -> None:
        """That an entry's list repeats nothing, nor anything that an entry before takes on the same node."""
        entry = self.engines[index]
        mine = getattr(entry, field) or []
        for other in self.engines[:index]:
            same_node = "all" in (entry.nodes, other.nodes) or set(entry.nodes) & set(other.nodes)
            if taken := set(mine) & set(getattr(other, field) or []) if same_node else set():
                raise ValueError(
                    f"engines.{index}.{field} = {mine}: {sorted(taken)} are another entry's, too. Fix: give each to one engine"
                )
        if len(set(mine)) != len(mine):
            raise ValueError(f"engines.{index}.{field} = {mine} repeats one. Fix: give each to one engine")


class RewardFunctionConfig(Section):
    """A reward function, and the processes that run it."""

    function: str
    """A name that is built in, or a dotted path 'package.module:function' to a function, plain or async, that takes
    (response: str, ground_truth: str, data_source: str) and returns a float or a bool."""
    scope: Literal["last_boxed", "response"] = "last_boxed"
    """math_verify: judge the last \\boxed{}, or whatever answer the whole response holds (as the paper's released code, where
    a truncated response can score)."""
    after_think: bool = True
    """math_verify: judge only what follows the last </think>, where a response has one."""
    batched: bool = False
    """The function takes three lists instead and returns a list."""
    batch_size: PositiveInt = 8
    """Most responses in one call of a batched function, and under way at once in an async one, for each worker."""
    workers: PositiveInt = 2
    """Worker processes."""
    timeout_s: PositiveFloat = 10.0
    """Limit for one response (batched: one call); the worker is then killed and the time-out counted."""
    memory_mb: Annotated[int, Field(ge=256)] | None = 2048
    """Most memory a worker may allocate, in MiB; more is a crash. None: no limit, which functions that use CUDA need."""


class ExtraRewardConfig(RewardFunctionConfig):
    """A reward that is added to the main one."""

    weight: FiniteFloat = 1.0
    """What its score (a bool: 1 or 0) is multiplied by."""


class OverlongConfig(Section):
    """DAPO's soft overlong punishment (arXiv 2503.14476, Eq. 13): responses that come near the limit lose reward."""

    buffer_tokens: PositiveInt
    """The penalty grows linearly over the last so many tokens before rollout.max_response_tokens."""
    penalty: PositiveFloat = 1.0
    """What a response of the full length loses."""


class RewardConfig(RewardFunctionConfig):
    """How responses are judged. The main function says what is correct; the others only add to the reward."""

    function: str = "math_verify"
    """math_verify, or a dotted path 'package.module:function' to a function, plain or async, that takes
    (response: str, ground_truth: str, data_source: str) and returns a float or a bool."""
    correct: FiniteFloat = 1.0
    """Reward of a correct answer."""
    incorrect: FiniteFloat = 0.0
    """Reward of everything else; paper: -1."""
    correct_above: float = 0.5
    """A user function's float above this counts as correct, and is the reward; a bool chooses correct or incorrect."""
    format_weight: FiniteFloat = 0.0
    """Added to the reward when a response closes </think> once at most and then holds a \\boxed{}."""
    overlong: OverlongConfig | None = None
    """Subtracted from the reward of responses near the length limit."""
    extra: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")], ExtraRewardConfig] = {}
    """Further rewards by name, each added times its weight and logged as reward_part/NAME."""

    @model_validator(mode="after")
    def _names(self) -> "RewardConfig":
        if taken := {"answer", "format", "overlong"} & set(self.extra):
            raise ValueError(f"extra: {', '.join(sorted(taken))} is a part's name already. Fix: choose another name")
        return self


class TrainConfig(Section):
    """Steps and their division into updates and micro-batches."""

    steps: PositiveInt = 1000
    """Rollout batches to train on."""
    prompts_per_update: PositiveInt = 16
    """Groups in one optimizer step; rollout.prompts_per_step / this is the updates per step."""
    tokens_per_microbatch: PositiveInt = 32768
    """Most packed tokens in one forward pass of one data-parallel rank, whose context-parallel ranks share them out."""
    mask_truncated: bool = False
    """Leave responses cut at rollout.max_response_tokens out of the loss. Their rewards still shape their group's."""
    recompute: Literal["none", "full"] = "none"
    """Activation recompute: full keeps only each layer's input."""


# Types of the values that may change over a run: plain numbers in LossConfig, numbers or schedules in AlgorithmConfig.
LowerClip = TypeVar("LowerClip")
NonNegative = TypeVar("NonNegative")


class _LossFields(Section, Generic[LowerClip, NonNegative]):
    """The settings of the loss. LossConfig and AlgorithmConfig differ in what some of them may be."""

    objective: Objective = "ce_gppo"
    """ce_gppo: Eq. 8 of arXiv 2509.20712; ppo_clip, dapo, cispo, gspo: what it is compared with."""
    clip_low: LowerClip = 0.2  # type: ignore[assignment]  # right for either type
    """Lower bound of the ratio is 1 - clip_low; below 1."""
    clip_high: NonNegative = 0.2  # type: ignore[assignment]  # right for either type
    """Upper bound of the ratio is 1 + clip_high."""
    beta1: NonNegative | None = None
    """ce_gppo, required: weight of tokens with A < 0 and ratio < 1 - clip_low. Larger: entropy falls faster. Paper: 0.5 (1.5B), 0.75 (7B)."""
    beta2: NonNegative | None = None
    """ce_gppo, required: weight of tokens with A > 0 and ratio > 1 + clip_high. Larger: entropy falls slower. Paper: 1."""
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    """Bound c on the ratio of tokens with A < 0. Off in the paper, 10 in its released code."""
    entropy_coef: NonNegative = 0.0  # type: ignore[assignment]  # right for either type
    """Weight of an entropy bonus."""
    kl_coef: NonNegativeFloat = 0.0
    """Weight of the KL to a reference policy: the weights that the run starts from. Above 0 it keeps a copy of them in host memory."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that KL."""
    nll_coef: NonNegativeFloat = 0.0
    """Weight of the NLL of correct samples. 0 in the paper, 0.1 in its released code."""
    aggregation: Aggregation = "token_mean"
    """token_mean: one global token count an update; group_token_mean: Eq. 8 to the letter; seq_*: sequence means."""
    importance_correction: Literal["truncated", "masked"] | None = None
    """Weigh the objective with w = old policy's probability / engine's probability (algorithm/importance.py). truncated: at most
    importance_cap; masked: 0 where w is above importance_cap or below its inverse."""
    importance_level: Literal["token", "sequence", "geometric"] | None = None
    """Of importance_correction: w of each token, of its whole response (the product over its tokens), or the geometric mean over
    these. None: token, and for gspo geometric, as its ratio is."""
    importance_cap: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] = 2.0
    """Of importance_correction."""

    high_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """A token is of high probability from here on, for the metrics by quadrant (Figure 1 of the paper)."""

    @model_validator(mode="after")
    def _betas(self) -> Self:
        if self.objective == "ce_gppo":
            for name in ("beta1", "beta2"):
                if getattr(self, name) is None:
                    raise ValueError(
                        f"{name} is missing, and objective = ce_gppo has no default for it. Fix: set it (the paper: beta1 0.5 or 0.75, beta2 1), or algorithm.preset: paper"
                    )
        elif self.beta1 is not None or self.beta2 is not None:
            raise ValueError(
                f"beta1 = {self.beta1}, beta2 = {self.beta2} have no meaning for objective = {self.objective}. Fix: remove them, or the preset that sets them"
            )
        return self

    @property
    def correction_level(self) -> Literal["token", "sequence", "geometric"]:
        """importance_level, with what its default stands for."""
        return self.importance_level or ("geometric" if self.objective == "gspo" else "token")


class LossConfig(_LossFields[Below1, NonNegativeFloat]):
    """The objective with the values in force in an update (megatron_gppo.algorithm.policy_loss)."""


# Where algorithm.preset starts from. The paper compares the last four with CE-GPPO; its baselines have no KL.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "objective": "ce_gppo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "beta1": 0.5,
        "beta2": 1.0,
        "aggregation": "token_mean",
    },
    "released-code": {
        "objective": "ce_gppo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "beta1": 0.5,
        "beta2": 1.0,
        "dual_clip": 10.0,
        "nll_coef": 0.1,
        "aggregation": "token_mean",
    },
    "grpo": {
        "objective": "ppo_clip",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "seq_mean_token_mean",
    },
    "dapo": {
        "objective": "dapo",
        "clip_low": 0.2,
        "clip_high": 0.28,
        "aggregation": "token_mean",
    },
    "cispo": {
        "objective": "cispo",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "aggregation": "token_mean",
    },
    "gspo": {
        "objective": "gspo",
        "clip_low": 3e-4,
        "clip_high": 4e-4,
        "aggregation": "seq_mean_token_mean",
    },
}


class EntropyTargetConfig(Section):
    """A controller that moves beta1 and beta2, once a step, so that the policy's entropy comes near a target."""

    target: ScheduledPositive
    """Entropy in nats a token, or a schedule of it: a curve to follow."""
    beta1: tuple[NonNegativeFloat, NonNegativeFloat] = (0.0, 1.0)
    """Least and most beta1; twice the same number keeps it there. The default is the range that the paper tried."""
    beta2: tuple[NonNegativeFloat, NonNegativeFloat] = (0.5, 1.0)
    """Least and most beta2; likewise."""
    gain: PositiveFloat = 1.0
    """Share of both ranges that a relative error of 1 moves them by: entropy 10% above the target by 0.1 of them."""
    integral_steps: PositiveFloat = 50.0
    """Steps in which an error that stays moves them by as much again."""
    max_change: Probability = 0.05
    """Most that one step moves them by, as a share of their ranges."""

    @model_validator(mode="after")
    def _ranges(self) -> "EntropyTargetConfig":
        for name in ("beta1", "beta2"):
            least, most = getattr(self, name)
            if least > most:
                raise ValueError(
                    f"{name} = [{least}, {most}] is not [least, most]. Fix: swap algorithm.entropy_target.{name}"
                )
        return self


class AlgorithmConfig(_LossFields[ScheduledBelow1, ScheduledNonNegative]):
    """The loss and the advantages, by preset and overrides.

    clip_low, clip_high, beta1, beta2 and entropy_coef are numbers, or schedules over steps in the form of schedules.py.
    """

    preset: Literal["paper", "released-code", "grpo", "dapo", "cispo", "gspo"] | None = None
    """Values that the fields here start from (PRESETS); each can still be set."""
    advantage: Advantage = "mean_std"
    """Of a response, within its group. mean_std: (reward - mean) / std, Eq. 2; mean: reward - mean; leave_one_out: reward - mean of the others."""
    entropy_target: EntropyTargetConfig | None = None
    """ce_gppo: hold the entropy near a target by moving beta1 and beta2, which start where they are set. None: they stay there."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("preset"), str):
            return {**PRESETS.get(values["preset"], {}), **values}
        return values

    @model_validator(mode="after")
    def _start_of_the_controller(self) -> Self:
        if self.entropy_target is None:
            return self
        if self.objective != "ce_gppo":
            raise ValueError(
                f"entropy_target moves beta1 and beta2, which objective = {self.objective} does not have. Fix: remove algorithm.entropy_target"
            )
        for name in ("beta1", "beta2"):
            start, (least, most) = getattr(self, name), getattr(self.entropy_target, name)
            if isinstance(start, Schedule):
                raise ValueError(
                    f"{name} is a schedule, and entropy_target moves it, too. Fix: give algorithm.{name} the number to start from"
                )
            if not least <= start <= most:
                raise ValueError(
                    f"{name} = {start} is not in entropy_target.{name} = [{least}, {most}]. Fix: start inside, or widen the range"
                )
        return self

    def at(self, step: int) -> LossConfig:
        """The values in force in a step, counted from 1."""
        fields = {name: getattr(self, name) for name in LossConfig.model_fields}
        return LossConfig.model_validate(
            {name: value.at(step) if isinstance(value, Schedule) else value for name, value in fields.items()}
        )


class OptimizerConfig(Section):
    """Megatron's Adam and its learning rate."""

    lr: ScheduledNonNegative = 1e-6
    """Peak learning rate, or a schedule of it over steps, which the warm-up scales."""
    min_lr: NonNegativeFloat = 0.0
    """Where cosine and linear decay end."""
    warmup_updates: Annotated[int, Field(ge=0)] = 10
    """Updates of linear warm-up from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Of a peak that is a number: after warm-up, to the last update of the run."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled; never applied to norms and biases."""
    betas: tuple[Annotated[float, Field(ge=0.0, lt=1.0)], Annotated[float, Field(ge=0.0, lt=1.0)]] = (0.9, 0.95)
    """Adam's decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    grad_clip: PositiveFloat = 1.0
    """Most global gradient norm."""
    distributed: bool = True
    """Shard optimizer state over data-parallel ranks."""

    @model_validator(mode="after")
    def _lrs(self) -> "OptimizerConfig":
        if isinstance(self.lr, Schedule):
            if self.schedule != "constant" or self.min_lr > 0:
                raise ValueError(
                    f"schedule = {self.schedule}, min_lr = {self.min_lr} decay a learning rate that is a number, and lr is a schedule. "
                    "Fix: put the decay into optimizer.lr, or give it a number"
                )
            if max(self.lr.values) == 0:
                raise ValueError("lr is 0 in every step. Fix: raise optimizer.lr")
        elif self.lr == 0:
            raise ValueError("lr = 0.0 moves nothing. Fix: raise optimizer.lr")
        elif self.min_lr > self.lr:
            raise ValueError(f"min_lr = {self.min_lr} is above lr = {self.lr}. Fix: lower optimizer.min_lr")
        return self

    def peak_lr(self, step: int) -> float:
        """What warm-up leads to and decay starts from, in a step counted from 1."""
        return value_at(self.lr, step)


class SyncConfig(Section):
    """Weights from the policy to the engines."""

    transport: Literal["distributed", "tensor", "disk"] = "distributed"
    """distributed: a torch.distributed group of rank 0 and the engines. tensor: memory that both see, for engines on the
    trainer's GPUs (CUDA IPC) or, on the CPU, on rank 0's machine. disk: a folder that the engines read."""
    bucket_mb: PositiveInt = 512
    """Size of a flattened bucket in MiB. Rank 0 keeps two of them."""
    pause: PauseMode = "abort"
    """What becomes of requests in flight. abort: they end with what they have. retract: they wait, and go on with a new KV
    cache by the new weights. in_place: they wait, and go on with the KV cache of the old weights."""
    disk_dir: Path | None = None
    """Folder of transport disk, under the same path for the engines. None is run.dir/weights."""
    host: str = "127.0.0.1"
    """Address of rank 0's machine that the engines can reach, for the weight-transfer group."""
    timeout_s: PositiveFloat = 300.0
    """Limit for each phase of a sync; the error names phase and peer."""
    verify_every: PositiveInt = 10
    """Compare the engine's log-probs of a probe sequence with the policy's every so many syncs."""
    verify_tolerance: PositiveFloat | None = None
    """Most mean absolute difference there, in nats. None is 1e-4 in fp32 and 0.05 in bf16."""
    verify_all_every: PositiveInt | None = None
    """Every so many syncs, overwrite all of the engines' tensors and sync again, to prove that each is written. It is always
    done before the first step. None: not again."""

    @model_validator(mode="after")
    def _disk(self) -> "SyncConfig":
        if self.disk_dir is not None and self.transport != "disk":
            raise ValueError(f"disk_dir is of use with transport: disk only, not {self.transport}. Fix: drop either")
        return self


class AsyncConfig(Section):
    """Generation beside training."""

    staleness: Annotated[int, Field(ge=0, le=2)] = 0
    """Steps by which the weights that generate may be older than those that are trained on what they generated. 0: generation
    and training alternate. 1, 2: while one step trains, as many of the following steps are generated."""
    partial_rollouts: bool = True
    """staleness > 0: a weight sync need not wait for what is being generated. Responses go on under the new weights, as
    sync.pause says, and are then of several versions. False: it waits, and every response is of one version."""


class BenchmarkConfig(SourceConfig):
    """A set of problems and how to sample on it. In YAML the path of a file with these fields is enough; `base: FILE`
    starts from such a file, and a `path` beside it replaces where that one's rows come from, columns included."""

    system_prompt: str | None = None
    """Instead of data.system_prompt."""
    prompt_suffix: str | None = None
    """Instead of data.prompt_suffix."""
    samples: PositiveInt | None = None
    """Instead of eval.samples; likewise below."""
    temperature: Temperature | None = None
    """Instead of eval.temperature."""
    top_p: Probability | None = None
    """Instead of eval.top_p."""
    max_response_tokens: PositiveInt | None = None
    """Instead of eval.max_response_tokens."""

    @model_validator(mode="before")
    @classmethod
    def _with_base(cls, values: Any) -> Any:
        if isinstance(values, str | Path):
            values = {"base": values}
        if not isinstance(values, dict) or "base" not in values:
            return values
        own = {key: value for key, value in values.items() if key != "base"}
        base = _read_yaml(values["base"], "an existing benchmark file")
        if "path" in own:
            base = {key: value for key, value in base.items() if key not in _PLACE_FIELDS}
        return {**base, **own}


# What a benchmark's own path replaces of its base.
_PLACE_FIELDS = {"path", "hub", "subset", "split", *ColumnsConfig.model_fields}


class EvalConfig(SamplingConfig):
    """Evaluation: by megatron-gppo eval, and during training. Sampling is every benchmark's that sets none itself."""

    temperature: Temperature = 0.6
    """Paper: 0.6."""
    top_p: Probability = 0.95
    """Paper: 0.95."""
    samples: PositiveInt = 8
    """Responses per problem: k of avg@k."""
    benchmarks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")], BenchmarkConfig] = {}
    """Benchmarks by name, beside those of data.eval."""
    every: PositiveInt | None = None
    """Training: evaluate after every so many steps. None: never."""
    before_training: bool = True
    """Training, with every: also before the first step."""


class RunConfig(Section):
    """The run's folder, its seed, and its checkpoints."""

    dir: Path
    """Everything the run writes: config.yaml, checkpoints/, tensorboard/."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of data order, sampling and initialisation."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest complete checkpoint in dir; never refuses a dir that has one."""
    save_every: PositiveInt = 20
    """Steps between checkpoints; one is also saved at the end and on SIGTERM or Ctrl-C."""
    keep_last: PositiveInt = 3
    """Checkpoints to keep."""
    collective_timeout_s: PositiveFloat = 1800.0
    """Limit for a collective operation between ranks."""
    stall_timeout_s: PositiveFloat = 600.0
    """Time without any progress after which all ranks print what they are at, and end. What has a limit of its own (a request, a
    part of a sync, a collective operation) gets that on top."""
    log_samples: Annotated[int, Field(ge=0)] = 3
    """Prompt, response and reward of so many samples a step, as text in TensorBoard."""


class Config(Section):
    """A run."""

    model: ModelConfig
    run: RunConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    rollout: RolloutConfig = RolloutConfig()
    async_: AsyncConfig = Field(default=AsyncConfig(), alias="async")
    reward: RewardConfig = RewardConfig()
    train: TrainConfig = TrainConfig()
    algorithm: AlgorithmConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    sync: SyncConfig = SyncConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _across_sections(self) -> "Config":
        per_step, per_update = self.rollout.prompts_per_step, self.train.prompts_per_update
        if per_step % per_update:
            raise ValueError(
                f"rollout.prompts_per_step = {per_step} is not a multiple of train.prompts_per_update = {per_update}. Fix: change either"
            )
        longest = self.data.max_prompt_tokens + self.rollout.max_response_tokens
        if self.train.tokens_per_microbatch < longest:
            raise ValueError(
                f"train.tokens_per_microbatch = {self.train.tokens_per_microbatch} cannot hold one sample of data.max_prompt_tokens + "
                f"rollout.max_response_tokens = {longest} tokens. Fix: raise it, or lower the other two"
            )
        if self.rollout.mode != "replay" and not self.data.train:
            raise ValueError(
                "data.train is missing. Fix: name the file with the training prompts, or set rollout.mode: replay"
            )
        if self.async_.staleness > 0 and self.rollout.mode == "replay":
            raise ValueError(
                f"async.staleness = {self.async_.staleness} is about generation, and rollout.mode: replay has none. Fix: set async.staleness: 0"
            )
        if self.rollout.placement == "colocated" and self.sync.transport == "distributed":
            raise ValueError(
                "sync.transport = distributed with rollout.placement: colocated: NCCL refuses a trainer's rank and an engine's on one "
                "GPU. Fix: set sync.transport: tensor (or disk)"
            )
        if self.async_.staleness > 0 and self.rollout.placement == "colocated":
            raise ValueError(
                f"async.staleness = {self.async_.staleness} generates while the policy trains, and rollout.placement: colocated gives "
                "its GPUs to either. Fix: set rollout.placement: disaggregated, or async.staleness: 0"
            )
        return self

    @model_validator(mode="after")
    def _evaluation(self) -> "Config":
        if self.eval.every is not None and not (self.data.eval or self.eval.benchmarks):
            raise ValueError(
                f"eval.every = {self.eval.every}, but there is nothing to evaluate on. Fix: set eval.benchmarks or data.eval"
            )
        if self.eval.every is not None and self.rollout.mode == "replay":
            raise ValueError(
                f"eval.every = {self.eval.every} needs an engine, and rollout.mode: replay has none. Fix: set eval.every: null"
            )
        if self.data.decontamination_ngram is not None and not (self.data.eval or self.eval.benchmarks):
            raise ValueError(
                f"data.decontamination_ngram = {self.data.decontamination_ngram} compares with nothing. Fix: set eval.benchmarks or data.eval"
            )
        overlong = self.reward.overlong
        if overlong is not None and overlong.buffer_tokens > self.rollout.max_response_tokens:
            raise ValueError(
                f"reward.overlong.buffer_tokens = {overlong.buffer_tokens} is more than rollout.max_response_tokens = "
                f"{self.rollout.max_response_tokens}. Fix: lower it"
            )
        return self

    @property
    def updates_per_step(self) -> int:
        return self.rollout.prompts_per_step // self.train.prompts_per_update


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is there twice: YAML would silently keep the last one, and lose the first one's section."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:  # type: ignore[assignment]
    """Reads a YAML file and applies overrides of the form ``section.key=value`` (value in YAML syntax).

    Raises ConfigError on anything that is wrong with either.
    """
    tree = _read_yaml(path, "an existing YAML file to --config")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree)


def _read_yaml(path: str | Path, wanted: str) -> dict[str, Any]:
    try:
        tree = yaml.load(Path(path).read_text(), _UniqueKeyLoader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}. Fix: give {wanted}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not sections. Fix: start with e.g. 'model:'")
    return tree


def parse_config(tree: dict[str, Any]) -> Config:
    """Validates a nested dictionary. Raises ConfigError."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(_describe(item) for item in error.errors()))) from None


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, which load_config reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value. Fix: quote it") from None
    node = tree
    for depth, part in enumerate(parts[:-1]):
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(parts[: depth + 1])} is a value, not a section")
    node[parts[-1]] = value


def _describe(item: Any) -> str:
    """One validation error as 'field = value: what is wrong. Fix: ...'."""
    names = [str(part) for part in item["loc"]]
    if item["type"] == "extra_forbidden":
        known = _fields_beside(item["loc"])
        close = difflib.get_close_matches(names[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{'.'.join(names)} = {item['input']!r}: unknown key; {hint}"
    # For a field of several types pydantic appends the one it tried, which is no part of the field's name.
    types = ("str", "int", "float", "bool", NUMBER, SCHEDULE)
    field = ".".join(name for name in names if name not in types and "[" not in name)
    if item["type"] == "missing":
        return f"{field}: missing. Fix: set it in the YAML file or as an override {field}=..."
    if item["type"] == "value_error":
        return f"{field + ': ' if field else ''}{item['ctx']['error']}"
    return f"{field} = {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}. Fix: change {field}"


def _fields_beside(location: tuple[Any, ...]) -> list[str]:
    """The fields of the section that holds the last name of a location; indices and dictionary keys lead to no section."""
    section: type[BaseModel] = Config
    for part in location[:-1]:
        if part in (fields := _fields(section)):
            section = _section_in(fields[part].annotation) or section
    return list(_fields(section))


def _fields(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """By the names that YAML has for them: `async` cannot be a name in Python."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section among an annotation's types, e.g. of `dict[str, BenchmarkConfig]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner))), None)
