"""What a run will be, worked out before any GPU is touched: ranks, batches, optimizer steps, memory."""

import math
from dataclasses import dataclass

import torch

from megatron_gppo.config import Config, ConfigError
from megatron_gppo.convert import Architecture, ConvertError, parameters

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that the policy's state takes on the rank that holds most of it; activations come on top."""

    weights: int
    gradients: int
    optimizer: int
    reference: int = 0  # in host memory, so not part of the total

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


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
    num_parameters_per_rank: int  # of the rank that holds most
    memory: Memory


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

    replicas = (dp * layout.cp, ranks_per_stage // layout.ep) if config.optimizer.distributed else (1, 1)
    fullest = max((_parameters_of_stage(architecture, stage, config) for stage in range(layout.pp)), key=sum)
    return Plan(
        config=config,
        architecture=architecture,
        world_size=world_size,
        dp=dp,
        samples_per_step=config.rollout.prompts_per_step * responses,
        samples_per_update=samples_per_update,
        longest_sample=longest,
        optimizer_steps=config.train.steps * config.updates_per_step,
        num_parameters=sum(math.prod(parameter.shape) for parameter in parameters(architecture)),
        num_parameters_per_rank=sum(fullest),
        memory=_memory(fullest, replicas, config),
    )


def render(plan: Plan) -> str:
    """The plan as text, for --dry-run and the start of a run."""
    config, layout, memory = plan.config, plan.config.parallel, plan.memory
    bf16 = config.model.dtype == "bf16"
    tokens = plan.samples_per_update * plan.longest_sample
    optimizer = "fp32 master weights and two moments" if bf16 else "two fp32 moments"
    over = f"dp {plan.dp}" + (f" x cp {layout.cp}" if layout.cp > 1 else "")
    sharded = f", sharded over {over}" if config.optimizer.distributed and plan.dp * layout.cp > 1 else ""
    pipeline = f", {layout.vpp} chunks a pipeline rank" if layout.vpp and layout.vpp > 1 else ""
    experts = f", experts shared out among {layout.ep}" if layout.ep > 1 else ""
    rows = [
        (
            "ranks",
            f"{plan.world_size} = dp {plan.dp} x tp {layout.tp} x pp {layout.pp} x cp {layout.cp}{pipeline}{experts}",
        ),
        (
            "model",
            f"{plan.architecture.name}, {plan.num_parameters:,} parameters; at most {plan.num_parameters_per_rank:,} on a rank",
        ),
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
        (
            "memory",
            f"{memory.total / GIB:.2f} GiB on the fullest rank: weights {memory.weights / GIB:.2f} ({config.model.dtype}), "
            f"gradients {memory.gradients / GIB:.2f} (fp32), optimizer {memory.optimizer / GIB:.2f} ({optimizer}{sharded})",
        ),
        ("", "not counted: activations, communication buffers, the allocator's waste, and an engine on the same GPU"),
    ]
    if memory.reference:
        rows.append(
            (
                "reference",
                f"{memory.reference / GIB:.2f} GiB more on that rank, in host memory: the initial weights ({config.model.dtype}), "
                "for algorithm.kl_coef > 0",
            )
        )
    return "\n".join(f"{name:<13}{text}" for name, text in rows)


def _parameters_of_stage(architecture: Architecture, stage: int, config: Config) -> tuple[int, int]:
    """Parameters on one rank of a pipeline stage, and of its experts. Interleaving changes which layers a stage has, not how many."""
    tp, pp = config.parallel.tp, config.parallel.pp
    layers_per_stage = architecture.num_layers // pp
    count = experts = 0
    for parameter in parameters(architecture):
        size = parameter.shard(torch.empty(parameter.shape, device="meta"), 0, tp).numel()
        if parameter.expert is not None:
            experts += size * (int(parameter.name.split(".")[2]) // layers_per_stage == stage)
        elif parameter.name.startswith("decoder.layers."):
            count += size * (int(parameter.name.split(".")[2]) // layers_per_stage == stage)
        elif parameter.name.startswith("embedding."):
            copied = architecture.tied_embeddings and stage == pp - 1  # as the output layer
            count += size * (stage == 0 or copied)
        else:
            count += size * (stage == pp - 1)
    return count, experts // config.parallel.ep


def _memory(num_parameters: tuple[int, int], replicas: tuple[int, int], config: Config) -> Memory:
    """Gradients are reduced in fp32. The optimizer holds Adam's two moments in fp32 and, for bf16 weights, fp32 masters.

    Parameters, and the replicas that the optimizer's state is sharded over, are given apart for experts.
    """
    bf16 = config.model.dtype == "bf16"
    sharded = sum(-(-count // copies) for count, copies in zip(num_parameters, replicas, strict=True))
    weights = sum(num_parameters) * (2 if bf16 else 4)
    return Memory(
        weights=weights,
        gradients=sum(num_parameters) * 4,
        optimizer=sharded * (12 if bf16 else 8),
        reference=weights if config.algorithm.kl_coef > 0 else 0,
    )
