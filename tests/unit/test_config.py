"""Every way in which a configuration can be wrong names the field, the value and the fix; every way to be right loads."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_gppo.config import (
    PRESETS,
    Config,
    ConfigError,
    EntropyTargetConfig,
    LossConfig,
    dump_config,
    load_config,
    parse_config,
)

MINIMAL: dict[str, Any] = {
    "model": {"hf_path": "model"},
    "run": {"dir": "run"},
    "data": {"train": "train.jsonl"},
    "algorithm": {"preset": "paper"},
}
EXAMPLES = Path(__file__).parents[2] / "examples"


def make_tree(changes: dict[str, Any]) -> dict[str, Any]:
    """MINIMAL with dotted keys set."""
    tree = copy.deepcopy(MINIMAL)
    for key, value in changes.items():
        section, *name = key.split(".")
        if name:
            tree.setdefault(section, {})[name[0]] = value
        else:
            tree[section] = value
    return tree


def parse(**changes: Any) -> Config:
    return parse_config(make_tree({key.replace("__", "."): value for key, value in changes.items()}))


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


@pytest.fixture
def minimal_file(tmp_path: Path) -> Path:
    return write(tmp_path, yaml.safe_dump(MINIMAL))


def test_defaults_are_the_papers_setting() -> None:
    config = parse()
    assert (config.algorithm.objective, config.algorithm.beta1, config.algorithm.beta2) == ("ce_gppo", 0.5, 1.0)
    assert (config.algorithm.clip_low, config.algorithm.clip_high) == (0.2, 0.2)
    assert (config.algorithm.dual_clip, config.algorithm.nll_coef, config.algorithm.kl_coef) == (None, 0.0, 0.0)
    assert config.algorithm.aggregation == "token_mean"
    assert (config.rollout.responses_per_prompt, config.rollout.max_response_tokens) == (8, 16384)
    assert (config.optimizer.lr, config.optimizer.grad_clip, config.optimizer.weight_decay) == (1e-6, 1.0, 0.1)
    assert config.updates_per_step == 8


def test_released_code_preset_adds_dual_clip_and_nll() -> None:
    algorithm = parse(algorithm__preset="released-code").algorithm
    assert (algorithm.dual_clip, algorithm.nll_coef) == (10.0, 0.1)


def test_presets_of_the_objectives_that_the_paper_compares_with() -> None:
    chosen = {
        preset: (algorithm.objective, algorithm.clip_low, algorithm.clip_high, algorithm.aggregation)
        for preset in ("grpo", "dapo", "cispo", "gspo")
        for algorithm in [parse(algorithm__preset=preset).algorithm]
    }
    assert chosen == {
        "grpo": ("ppo_clip", 0.2, 0.2, "seq_mean_token_mean"),
        "dapo": ("dapo", 0.2, 0.28, "token_mean"),
        "cispo": ("cispo", 0.2, 0.2, "token_mean"),
        "gspo": ("gspo", 3e-4, 4e-4, "seq_mean_token_mean"),
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_can_be_overridden_field_by_field(preset: str) -> None:
    algorithm = parse(algorithm={"preset": preset, "clip_high": 0.75}).algorithm
    assert algorithm.clip_high == 0.75
    rest = algorithm.model_dump(include=set(PRESETS[preset]) - {"clip_high"})
    assert rest == {name: value for name, value in PRESETS[preset].items() if name != "clip_high"}


@pytest.mark.parametrize("preset", PRESETS)
def test_the_resolved_config_shows_what_a_preset_sets(tmp_path: Path, preset: str) -> None:
    resolved = yaml.safe_load(dump_config(parse(algorithm={"preset": preset, "dual_clip": 4.0})))["algorithm"]
    assert resolved["dual_clip"] == 4.0
    assert PRESETS[preset].items() - {("dual_clip", 10.0)} <= resolved.items()
    assert parse(algorithm=resolved).algorithm == parse(algorithm={"preset": preset, "dual_clip": 4.0}).algorithm


def test_schedules_in_yaml(tmp_path: Path) -> None:
    text = yaml.safe_dump(MINIMAL | {"algorithm": None}) + (
        "algorithm:\n  preset: paper\n  beta1: {piecewise_constant: {1: 0, 585: 0.5}}\n  clip_high: {linear: {1: 0.2, 101: 0.3}}\n"
    )
    config = load_config(
        write(tmp_path, text.replace("algorithm: null\n", "")), ["optimizer.lr={cosine: {1: 1e-6, 1000: 0}}"]
    )
    at_start, later = config.algorithm.at(1), config.algorithm.at(585)
    assert (at_start.beta1, at_start.beta2, later.beta1) == (0.0, 1.0, 0.5)
    assert config.algorithm.at(51).clip_high == pytest.approx(0.25)
    assert config.optimizer.peak_lr(1000) == 0.0
    assert type(at_start) is LossConfig


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        # unknown keys
        ({"trian": {}}, ["trian = {}", "did you mean train?"]),
        ({"train.step": 3}, ["train.step = 3", "did you mean steps?"]),
        ({"algorithm.int": 1}, ["algorithm.int = 1", "known here: ", "beta1"]),
        ({"parallel.sequence_paralel": True}, ["parallel.sequence_paralel = True", "did you mean sequence_parallel?"]),
        ({"eval.zzz": 1}, ["eval.zzz = 1", "known here: temperature, top_p"]),
        # missing
        ({"algorithm": {}}, ["algorithm", "beta1 is missing", "algorithm.preset: paper"]),
        ({"algorithm": {"beta1": 0.5}}, ["beta2 is missing"]),
        ({"model": {}}, ["model.hf_path: missing", "model.hf_path=..."]),
        ({"run": {}}, ["run.dir: missing"]),
        ({"data": {}}, ["data.train is missing", "rollout.mode: replay"]),
        # types
        ({"train.steps": "many"}, ["train.steps = 'many'", "Fix: change train.steps"]),
        ({"train.steps": 1.5}, ["train.steps = 1.5"]),
        ({"train": 5}, ["train = 5"]),
        ({"data.train": 5}, ["data.train: 5 is not a path", "Fix: give a path"]),
        ({"data.train": {"path": "a", "wieght": 2}}, ["data.train.0.wieght = 2", "did you mean weight?"]),
        ({"eval.benchmarks": {"a": {"path": "b", "sampels": 2}}}, ["eval.benchmarks.a.sampels = 2", "mean samples?"]),
        (
            {"eval.benchmarks": {"a": "missing.yaml"}},
            ["eval.benchmarks.a: missing.yaml: No such file", "benchmark file"],
        ),
        ({"reward.extra": {"a": {"function": "b:c", "wieght": 2}}}, ["reward.extra.a.wieght", "did you mean weight?"]),
        ({"optimizer.betas": [0.9]}, ["optimizer.betas.1"]),
        ({"rollout.server_args": {"tp": None}}, ["rollout.server_args.tp = None: input should be a valid string"]),
        # bounds
        ({"train.steps": 0}, ["train.steps = 0", "greater than or equal to 1"]),
        ({"parallel.tp": 0}, ["parallel.tp = 0"]),
        ({"parallel.cp": 0}, ["parallel.cp = 0"]),
        ({"rollout.temperature": 0}, ["rollout.temperature = 0", "greater than or equal to 0.000001"]),
        ({"rollout.top_p": 1.5}, ["rollout.top_p = 1.5", "less than or equal to 1"]),
        ({"rollout.responses_per_prompt": 1}, ["rollout.responses_per_prompt = 1"]),
        ({"rollout.port": 70000}, ["rollout.port = 70000"]),
        ({"async.staleness": 3}, ["async.staleness = 3", "less than or equal to 2"]),
        ({"async.stalenes": 1}, ["async.stalenes = 1", "did you mean staleness?"]),
        ({"asynch.staleness": 1}, ["unknown key", "did you mean async?"]),
        ({"async_.staleness": 1}, ["unknown key", "did you mean async?"]),
        (
            {"async.staleness": 1, "rollout.mode": "replay", "rollout.replay": "recorded"},
            ["async.staleness = 1", "rollout.mode: replay has none"],
        ),
        (
            {"rollout.placement": "colocated"},
            ["sync.transport = distributed with rollout.placement: colocated", "Fix: set sync.transport: tensor"],
        ),
        (
            {"async.staleness": 2, "rollout.placement": "colocated", "sync.transport": "tensor"},
            ["async.staleness = 2", "Fix: set rollout.placement: disaggregated"],
        ),
        ({"algorithm.clip_low": 1.0}, ["algorithm.clip_low = 1.0"]),
        ({"algorithm.beta1": -0.1}, ["algorithm.beta1 = -0.1"]),
        ({"algorithm.dual_clip": 1.0}, ["algorithm.dual_clip = 1.0"]),
        ({"optimizer.lr": float("nan")}, ["optimizer.lr = nan", "finite"]),
        ({"optimizer.lr": float("inf")}, ["optimizer.lr = inf", "finite"]),
        ({"optimizer.betas": [0.9, 1.0]}, ["optimizer.betas.1 = 1.0"]),
        ({"reward.incorrect": float("nan")}, ["reward.incorrect = nan", "finite"]),
        ({"run.seed": -1}, ["run.seed = -1"]),
        # choices
        ({"model.dtype": "fp16"}, ["model.dtype = 'fp16'", "'bf16' or 'fp32'"]),
        ({"algorithm.preset": "papr"}, ["algorithm.preset = 'papr'", "'paper', 'released-code', 'grpo'"]),
        ({"algorithm.objective": "grpo"}, ["algorithm.objective = 'grpo'", "'ppo_clip'"]),
        ({"rollout.mode": "remote"}, ["rollout.mode = 'remote'"]),
        ({"parallel.ep": 0}, ["parallel.ep = 0"]),
        # impossible combinations
        ({"parallel.sequence_parallel": True}, ["sequence_parallel = true needs tp > 1"]),
        ({"parallel.vpp": 2}, ["vpp = 2 needs pp > 1"]),
        ({"data.question_column": "question"}, ["data.question_column and data.answer_column"]),
        (
            {"data": {"prompt_column": "p", "question_column": "q", "train": "a"}},
            ["prompt_column = p", "exclude each other"],
        ),
        ({"data.train": {"path": "a", "hub": "b/c"}}, ["path = a, hub = b/c", "set one of them"]),
        ({"data.train": {"path": "a", "subset": "b"}}, ["subset = b is for hub"]),
        ({"data.train": ["a", {"path": "b", "weight": 2}]}, ["weights = [None, 2.0]", "a weight, or none"]),
        ({"data.eval": {"path": "b", "weight": 2}}, ["a weight has no meaning there", "data.eval"]),
        (
            {"data.decontamination_ngram": 9},
            ["data.decontamination_ngram = 9 compares with nothing", "eval.benchmarks"],
        ),
        ({"eval.every": 5}, ["eval.every = 5", "nothing to evaluate on", "eval.benchmarks"]),
        (
            {"eval": {"every": 5, "benchmarks": {"a": {"path": "b"}}}, "rollout": {"mode": "replay", "replay": "c"}},
            ["eval.every = 5 needs an engine"],
        ),
        (
            {"reward.overlong": {"buffer_tokens": 20000}},
            ["reward.overlong.buffer_tokens = 20000", "16384. Fix: lower it"],
        ),
        ({"reward.extra": {"format": {"function": "b:c"}}}, ["format is a part's name already"]),
        ({"rollout.mode": "external"}, ["urls = [] with mode = external", "rollout.urls"]),
        ({"rollout.urls": ["http://a:1"]}, ["urls = ['http://a:1'] with mode = managed"]),
        ({"rollout.mode": "replay"}, ["replay = None with mode = replay", "rollout.replay"]),
        ({"rollout.replay": "recorded"}, ["replay = recorded with mode = managed"]),
        ({"rollout": {"mode": "replay", "replay": "a", "record": "b"}}, ["record = b", "remove rollout.record"]),
        ({"rollout.host": "0.0.0.0"}, ["host = 0.0.0.0", "rollout.api_key"]),
        ({"optimizer.min_lr": 1.0}, ["min_lr = 1.0 is above lr = 1e-06", "optimizer.min_lr"]),
        ({"algorithm.objective": "dapo"}, ["beta1 = 0.5, beta2 = 1.0", "objective = dapo", "or the preset"]),
        ({"algorithm": {"preset": "grpo", "beta1": 0.5}}, ["beta1 = 0.5, beta2 = None", "objective = ppo_clip"]),
        ({"optimizer.lr": 0}, ["lr = 0.0 moves nothing", "raise optimizer.lr"]),
        # schedules
        ({"algorithm.beta1": {"step": {1: 0, 5: 1}}}, ["algorithm.beta1", "{'step': {1: 0, 5: 1}} is not a schedule"]),
        ({"algorithm.beta1": {"linear": {1: 0}}}, ["algorithm.beta1: linear has 1 of at least 2 points"]),
        ({"algorithm.beta1": {"linear": {1: 0, 5: -1}}}, ["algorithm.beta1.linear.5 = -1", "equal to 0"]),
        ({"algorithm.clip_low": {"linear": {1: 0, 5: 1}}}, ["algorithm.clip_low.linear.5 = 1", "less than 1"]),
        ({"optimizer.lr": {"cosine": {1: 0, "end": 1}}}, ["optimizer.lr.cosine.end", "valid integer"]),
        ({"optimizer.lr": {"cosine": {1: 0, 9: 0}}}, ["lr is 0 in every step"]),
        ({"algorithm.kl_coef": {"linear": {1: 0, 9: 1}}}, ["algorithm.kl_coef = {'linear'", "valid number"]),
        (
            {"optimizer": {"lr": {"linear": {1: 1e-6, 9: 0}}, "schedule": "cosine"}},
            ["schedule = cosine", "lr is a schedule", "put the decay into optimizer.lr"],
        ),
        # the entropy controller
        ({"algorithm.entropy_target": {}}, ["algorithm.entropy_target.target: missing"]),
        ({"algorithm.entropy_target": {"target": 0}}, ["algorithm.entropy_target.target = 0", "greater than 0"]),
        ({"algorithm.entropy_target": {"taget": 1}}, ["algorithm.entropy_target.taget = 1", "did you mean target?"]),
        ({"algorithm.entropy_target": {"target": 1, "beta1": [1, 0]}}, ["beta1 = [1.0, 0.0] is not [least, most]"]),
        (
            {"algorithm": {"preset": "paper", "beta1": 2, "entropy_target": {"target": 1}}},
            ["beta1 = 2.0 is not in entropy_target.beta1 = [0.0, 1.0]", "widen the range"],
        ),
        (
            {"algorithm": {"preset": "paper", "beta2": {"linear": {1: 1, 5: 0.5}}, "entropy_target": {"target": 1}}},
            ["beta2 is a schedule, and entropy_target moves it", "the number to start from"],
        ),
        (
            {"algorithm": {"preset": "grpo", "entropy_target": {"target": 1}}},
            ["objective = ppo_clip", "remove algorithm.entropy_target"],
        ),
        ({"train.prompts_per_update": 7}, ["rollout.prompts_per_step = 128", "train.prompts_per_update = 7"]),
        ({"train.tokens_per_microbatch": 100}, ["train.tokens_per_microbatch = 100", "= 20480 tokens"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_mistakes_name_field_value_and_fix(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(make_tree(changes))
    message = str(error.value)
    for part in named:
        assert part in message
    assert "Fix: " in message or "unknown key" in message


def test_all_mistakes_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse(train__steps=0, eval__zzz=1, optimizer__lr=-1)
    assert len(str(error.value).splitlines()) == 3


def test_what_is_allowed_only_together() -> None:
    assert parse(parallel={"tp": 2, "sequence_parallel": True}).parallel.sequence_parallel
    assert parse(parallel={"pp": 2, "vpp": 2}).parallel.vpp == 2
    assert parse(rollout={"mode": "external", "urls": ["http://10.0.0.5:30000"]}).rollout.urls
    assert parse(rollout={"mode": "replay", "replay": "recorded"}, data={}).data.train == []
    assert parse(rollout={"host": "0.0.0.0", "api_key": "secret"}).rollout.api_key == "secret"
    data = parse(data={"train": ["a.jsonl", Path("b.parquet")], "question_column": "q", "answer_column": "a"}).data
    assert [source.path for source in data.train] == ["a.jsonl", "b.parquet"]
    assert parse(data={"train": {"hub": "a/b", "split": "test"}}).data.train[0].label == "hub a/b"
    assert parse(algorithm={"objective": "dapo", "clip_high": 0.28}).algorithm.beta1 is None


def test_config_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse().train.steps = 5  # type: ignore[misc]


def test_overrides(minimal_file: Path) -> None:
    overrides = ["train.steps=7", "optimizer.lr=1e-4", "rollout.mode=external", "rollout.urls=[http://a:1, http://b:2]"]
    overrides += [
        "algorithm.beta1=0.75",
        "parallel={tp: 2, sequence_parallel: true}",
        "model.checkpoint=null",
        "run.dir=a=b",
    ]
    config = load_config(minimal_file, overrides)
    assert config.train.steps == 7
    assert config.optimizer.lr == 1e-4
    assert config.rollout.urls == ["http://a:1", "http://b:2"]
    assert config.algorithm.beta1 == 0.75
    assert (config.parallel.tp, config.parallel.sequence_parallel) == (2, True)
    assert config.model.checkpoint is None
    assert config.run.dir == Path("a=b")


def test_last_override_wins(minimal_file: Path) -> None:
    assert load_config(minimal_file, ["train.steps=7", "train.steps=8"]).train.steps == 8


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.steps", "'train.steps' is not of the form section.key=value"),
        ("train..steps=1", "not of the form"),
        ("=1", "not of the form"),
        ("train.steps=[1", "'\\[1' is not a YAML value"),
        ("train.stepps=1", "train.stepps = 1: unknown key; did you mean steps?"),
        ("train.steps=0", "train.steps = 0"),
        ("model.hf_path.name=1", "model.hf_path is a value, not a section"),
    ],
)
def test_bad_overrides(minimal_file: Path, override: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load_config(minimal_file, [override])


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "holds NoneType, not sections"),
        ("- model", "holds list, not sections"),
        ("model: [", "not valid YAML"),
        ("model:\n  hf_path: a\nmodel:\n  dtype: fp32\n", "model is there twice"),
        ("model:\n  hf_path: a\n  hf_path: b\n", "hf_path is there twice"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, named: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError, match=named) as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: No such file or directory\. Fix: "):
        load_config(tmp_path / "no.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml: not valid YAML"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"algorithm.preset": "released-code", "algorithm.dual_clip": None},
        {"algorithm.preset": "gspo", "algorithm.kl_coef": 0.1},
        {"async.staleness": 2, "async.partial_rollouts": False, "algorithm.importance_level": "sequence"},
        {
            "algorithm": {
                "preset": "paper",
                "clip_high": {"linear": {1: 0.2, 30: 0.3}},
                "entropy_target": {"target": {"cosine": {1: 0.5, 100: 0.2}}, "beta2": [1, 1]},
            },
            "optimizer.lr": {"piecewise_constant": {0: 1e-6, 10: 0}},
        },
        {
            "data.train": ["a.jsonl", "b.jsonl"],
            "optimizer.lr": 1.1e-6,
            "rollout.server_args": {"mem_fraction_static": 0.8},
        },
        {
            "data.train": [
                {"path": "a", "weight": 1},
                {"hub": "b/c", "weight": 2, "question_column": "q", "answer_column": "a"},
            ],
            "eval.benchmarks": {
                "math500": str(EXAMPLES / "benchmarks" / "math500.yaml"),
                "mine": {"path": "d", "samples": 4},
            },
            "reward": {"overlong": {"buffer_tokens": 100}, "extra": {"brevity": {"function": "a:b", "weight": -0.5}}},
        },
    ],
)
def test_dumped_config_loads_to_an_equal_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = parse_config(make_tree(changes))
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_every_field_is_documented() -> None:
    sections = {section: field.annotation for section, field in Config.model_fields.items()}
    sections["algorithm.entropy_target"] = EntropyTargetConfig
    undocumented = [
        f"{section}.{name}"
        for section, fields in sections.items()
        for name, inner in fields.model_fields.items()  # type: ignore[union-attr]
        if not inner.description
    ]
    assert undocumented == []


def test_every_example_loads() -> None:
    paths = [path for pattern in ("*.yaml", "*.yml") for path in EXAMPLES.rglob(pattern)]
    assert paths, f"no configuration under {EXAMPLES}"
    for path in paths:
        if path.parent.name == "benchmarks":
            parse(eval={"benchmarks": {path.stem: str(path)}})
        else:
            load_config(path)


def test_the_papers_benchmarks() -> None:
    """Samples and lengths of the paper's Section 4, from files that name the public data sets and their columns."""
    files = {path.stem: str(path) for path in (EXAMPLES / "benchmarks").glob("*.yaml")}
    benchmarks = parse(eval={"benchmarks": files}).eval.benchmarks
    assert {name: (b.samples, b.max_response_tokens) for name, b in benchmarks.items()} == {
        "aime24": (32, 32768),
        "aime25": (32, 32768),
        "hmmt25": (32, 16384),
        "math500": (4, 16384),
        "amc23": (32, 16384),
    }
    for benchmark in benchmarks.values():
        assert (benchmark.temperature, benchmark.top_p) == (0.6, 0.95)
        assert benchmark.hub
        assert benchmark.split
        assert benchmark.question_column
        assert benchmark.answer_column
        assert "boxed" in (benchmark.prompt_suffix or "")


def test_a_benchmark_with_a_path_of_its_own_keeps_the_rest_of_its_base() -> None:
    base = str(EXAMPLES / "benchmarks" / "amc23.yaml")
    found = parse(eval={"benchmarks": {"amc": {"base": base, "path": "amc.jsonl", "samples": 8}}}).eval.benchmarks[
        "amc"
    ]
    assert (found.path, found.hub, found.split, found.question_column, found.answer_column) == (
        "amc.jsonl",
        *[None] * 4,
    )
    assert (found.samples, found.max_response_tokens, found.temperature) == (8, 16384, 0.6)
