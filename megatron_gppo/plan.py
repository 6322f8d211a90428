"""What a run will be, worked out before any GPU is touched: ranks, batches, optimizer steps, memory."""

import math
from dataclasses import dataclass

from megatron_gppo.config import Config, ConfigError
from megatron_gppo.convert import Architecture, ConvertError, parameters
from megatron_gppo.memory import EngineMemory, StageMemory, engine_memory, stage_memory

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Plan:
    """A validated run in numbers."""

    config: Config
    architecture: Architecture
    world_size: int
    dp: int
    samples_per_step: int
    samples_per_update: int
    longest_sample: int  # tokens: longest prompt that is let in, and longest response
    optimizer_steps: int
    num_parameters: int
    stages: list[StageMemory]  # by pipeline stage: what each of its ranks holds
    engines: dict[int, EngineMemory]  # of managed engines, by their tensor-parallel size

    @property
    def memory(self) -> StageMemory:
        """Of the fullest rank."""
        return max(self.stages, key=lambda stage: stage.total)


def make_plan(config: Config, architecture: Architecture, world_size: int) -> Plan:
    """Works out the run for this many ranks. Raises ConfigError for a layout or batch that cannot work."""
    layout = config.parallel
    model_ranks = layout.tp * layout.pp * layout.cp
    if world_size % model_ranks:
        usable = max(world_size // model_ranks, 1) * model_ranks
        raise ConfigError(
            f"world size = {world_size} is not a multiple of parallel.tp * parallel.pp * parallel.cp = {layout.tp} * {layout.pp} * "
            f"{layout.cp} = {model_ranks}. Fix: start e.g. {usable} ranks (torchrun --nproc-per-node), or change parallel.tp, parallel.pp or parallel.cp"
        )
    try:
        architecture.check_layout(tp=layout.tp, pp=layout.pp, vpp=layout.vpp, ep=layout.ep)
    except ConvertError as error:
        raise ConfigError(f"parallel: {error}") from error
    if architecture.num_experts and layout.tp > 1 and not layout.sequence_parallel:
        raise ConfigError(
            f"parallel.tp = {layout.tp} with experts needs sequence parallelism. Fix: set parallel.sequence_parallel=true"
        )
    ranks_per_stage = world_size // layout.pp
    if ranks_per_stage % layout.ep:
        raise ConfigError(
            f"parallel.ep = {layout.ep} does not divide the {ranks_per_stage} ranks of a pipeline stage, which share out the experts. "
            f"Fix: change parallel.ep, or start e.g. {math.lcm(model_ranks, layout.ep * layout.pp)} ranks"
        )

    dp = world_size // model_ranks
    responses = config.rollout.responses_per_prompt
    samples_per_update = config.train.prompts_per_update * responses
    if dp > samples_per_update:
        raise ConfigError(
            f"train.prompts_per_update = {config.train.prompts_per_update} x rollout.responses_per_prompt = {responses} are {samples_per_update} "
            f"samples an update, too few for {dp} data-parallel ranks. Fix: raise train.prompts_per_update to at least {-(-dp // responses)}, "
            f"raise parallel.tp, parallel.pp or parallel.cp, or start fewer ranks"
        )
    budget, alignment = config.train.tokens_per_microbatch, layout.row_alignment
    usable_budget = budget - budget % alignment
    longest = config.data.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > usable_budget:
        raise ConfigError(
            f"train.tokens_per_microbatch = {budget} holds {usable_budget} at the alignment of {alignment} that sequence and context parallelism "
            f"need, too few for one sample of {longest} tokens. Fix: raise it to {-(-longest // alignment) * alignment}"
        )
    if longest > architecture.max_position_embeddings:
        raise ConfigError(
            f"data.max_prompt_tokens + rollout.max_response_tokens = {config.data.max_prompt_tokens} + {config.rollout.max_response_tokens} "
            f"= {longest} tokens, more than max_position_embeddings = {architecture.max_position_embeddings} of the model. Fix: lower either"
        )

    rounds = layout.pp if layout.vpp and layout.vpp > 1 else 1  # interleaved stages take micro-batches in rounds
    num_microbatches = -(-samples_per_update // (dp * rounds)) * rounds  # each holds a sample, or fills the last round
    num_parameters = sum(math.prod(parameter.shape) for parameter in parameters(architecture))
    return Plan(
        config=config,
        architecture=architecture,
        world_size=world_size,
        dp=dp,
        samples_per_step=config.rollout.prompts_per_step * responses,
        samples_per_update=samples_per_update,
        longest_sample=longest,
        optimizer_steps=config.train.steps * config.updates_per_step,
        num_parameters=num_parameters,
        stages=stage_memory(config, architecture, world_size=world_size, num_microbatches=num_microbatches),
        engines={tp: engine_memory(config, architecture, num_parameters, tp) for tp in _engine_sizes(config)},
    )


def render(plan: Plan) -> str:
    """The plan as text, for --dry-run and the start of a run."""
    config, layout = plan.config, plan.config.parallel
    tokens = plan.samples_per_update * plan.longest_sample
    pipeline = f", {layout.vpp} chunks a pipeline rank" if layout.vpp and layout.vpp > 1 else ""
    experts = f", experts shared out among {layout.ep}" if layout.ep > 1 else ""
    rows = [
        (
            "ranks",
            f"{plan.world_size:,} = dp {plan.dp} x tp {layout.tp} x pp {layout.pp} x cp {layout.cp}{pipeline}{experts}",
        ),
        ("model", f"{plan.architecture.name}, {plan.num_parameters:,} parameters"),
        ("run", f"{config.train.steps:,} steps, {plan.optimizer_steps:,} optimizer steps"),
        (
            "step",
            f"{config.rollout.prompts_per_step:,} prompts x {config.rollout.responses_per_prompt} responses = "
            f"{plan.samples_per_step:,} samples, in {config.updates_per_step} updates",
        ),
        (
            "update",
            f"{config.train.prompts_per_update:,} prompts, {plan.samples_per_update:,} samples, at most {tokens:,} tokens; "
            f"about {plan.samples_per_update / plan.dp:g} samples a data-parallel rank",
        ),
        (
            "micro-batch",
            f"at most {config.train.tokens_per_microbatch:,} tokens; the longest sample has {plan.longest_sample:,}",
        ),
        *_memory_rows(plan),
    ]
    return "\n".join(f"{name:<13}{text}" for name, text in rows)


def _memory_rows(plan: Plan) -> list[tuple[str, str]]:
    config, layout = plan.config, plan.config.parallel
    optimizer = "fp32 master weights and two moments" if config.model.dtype == "bf16" else "two fp32 moments"
    over = f"dp {plan.dp}" + (f" x cp {layout.cp}" if layout.cp > 1 else "")
    sharded = f", sharded over {over}" if config.optimizer.distributed and plan.dp * layout.cp > 1 else ""
    if sharded and layout.ep > 1:
        sharded += f", experts' over {plan.world_size // (layout.pp * layout.ep)}"
    titles = ("stage", "parameters", "weights", "gradients", "optimizer", "activations", "working", "GiB a rank")
    table: list[tuple[str, ...]] = [titles]
    for number, stage in enumerate(plan.stages):
        sizes = (stage.weights, stage.gradients, stage.optimizer, stage.activations, stage.working, stage.total)
        table.append((str(number), f"{stage.parameters:,}", *(f"{size / GIB:.2f}" for size in sizes)))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    rows = list(zip(["memory", *[""] * len(plan.stages)], lines, strict=True))
    rows += [
        ("", f"weights in {config.model.dtype}, gradients in fp32; optimizer: {optimizer}{sharded}"),
        (
            "",
            f"activations of full micro-batches, recompute: {config.train.recompute}; formulas in megatron_gppo/memory.py",
        ),
        (
            "",
            "not counted: CUDA's context, communication buffers, the allocator's waste, and an engine on the same GPU",
        ),
    ]
    if plan.memory.reference:
        rows.append(
            (
                "reference",
                f"{plan.memory.reference / GIB:.2f} GiB more on the fullest rank, in host memory: the initial weights "
                f"({config.model.dtype}), for algorithm.kl_coef > 0",
            )
        )
    for tp, engine in plan.engines.items():
        rows.append(
            (
                "engine",
                f"{engine.weights / GIB:.2f} GiB of weights on each of tp = {tp} GPUs, and {engine.cache_per_token / 1024:.1f} KiB "
                f"a token in the cache: {plan.longest_sample * engine.cache_per_token / GIB:.2f} GiB for the longest sample",
            )
        )
    return rows


def _engine_sizes(config: Config) -> list[int]:
    """Tensor-parallel sizes of the managed engines, each once."""
    rollout = config.rollout
    if rollout.mode != "managed":
        return []
    return sorted({entry.tp or rollout.engine_tp for entry in rollout.engines} or {rollout.engine_tp})


def render_built(plan: Plan, built: list[int]) -> str:
    """What --dry-run says when Megatron has built the layout with these numbers of parameters, by stage."""
    planned = [stage.parameters for stage in plan.stages]
    assert built == planned, f"Megatron built stages of {built} parameters, the plan says {planned}"
    return f"{'builds':<13}Megatron's model of every stage, on the meta device as one of {plan.world_size:,} ranks: parameters as above"
