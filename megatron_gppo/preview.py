"""megatron-gppo data preview: what training and evaluation would see of the data, before anything is spent on it."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_gppo.config import Config
from megatron_gppo.convert import Architecture
from megatron_gppo.data import PromptSet, load_prompts, load_tokenizer
from megatron_gppo.evaluate import Benchmark, load_benchmarks
from megatron_gppo.rollout.rewards import Rewards
from megatron_gppo.training_prompts import load_training_prompts, without_unreadable_answers

HISTOGRAM_BINS = 10
HISTOGRAM_WIDTH = 40
SHOWN_BAD_ROWS = 10


def preview(config: Config, rows: int, console: Console | None = None) -> None:
    """Prints the first rows as the model gets them, counts, lengths, and what is dropped and why.

    Bad rows are listed rather than raised. Raises DataError when there is nothing to show, ConfigError and RewardError.
    """
    console = console or Console()
    config = config.model_copy(update={"data": config.data.model_copy(update={"on_bad_row": "skip"})})
    tokenizer = load_tokenizer(config.model.hf_path)
    benchmarks: list[Benchmark] = []
    if config.eval.benchmarks or config.data.eval:
        architecture = Architecture.from_hf(config.model.hf_path)
        benchmarks = load_benchmarks(config, tokenizer, architecture.max_position_embeddings)
    if config.data.train:
        prompts, contaminated = load_training_prompts(config, tokenizer, benchmarks)
        rewards = Rewards(config.reward)
        try:
            with console.status("reading the answers"):
                prompts = without_unreadable_answers(prompts, rewards, config)
        finally:
            rewards.close()
        _show_prompts(console, "data.train", prompts, config, rows)
        if contaminated:
            console.print(f"contaminated, e.g. {contaminated[0]}", markup=False, soft_wrap=True)
    if config.data.eval:
        _show_prompts(console, "data.eval", load_prompts(config.data, tokenizer, "eval"), config, rows)
    if benchmarks:
        console.print(_benchmark_table(benchmarks))


def _show_prompts(console: Console, name: str, prompts: PromptSet, config: Config, rows: int) -> None:
    console.rule(name, align="left")
    for prompt, origin in list(zip(prompts.prompts, prompts.origins, strict=True))[:rows]:
        facts = f"{len(prompt.token_ids)} tokens, data source {prompt.data_source}, ground truth {prompt.ground_truth}"
        console.print(f"{origin.place}: {facts}", style="bold", markup=False, highlight=False, soft_wrap=True)
        console.print(Text(prompt.text), soft_wrap=True)
    console.print(_counts_table(prompts))
    console.print("tokens of all prompts, before data.max_prompt_tokens", style="bold")
    for line in histogram(prompts.lengths, limit=config.data.max_prompt_tokens):
        console.print(line, markup=False, highlight=False)
    for message in prompts.bad_rows[:SHOWN_BAD_ROWS]:
        console.print(f"bad row: {message}", markup=False, highlight=False, soft_wrap=True)
    if (more := prompts.dropped["bad row"] - SHOWN_BAD_ROWS) > 0:
        console.print(f"... and {more} more bad rows")


def histogram(lengths: Sequence[int], *, limit: int) -> list[str]:
    """Lines of text: a bin's range, bar and count. A bin that lies beyond the limit as a whole is marked."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high + 1 - low) // HISTOGRAM_BINS))
    counts = [0] * -(-(high + 1 - low) // width)
    for length in lengths:
        counts[(length - low) // width] += 1
    lines = []
    for index, count in enumerate(counts):
        first = low + index * width
        bar = "#" * -(-count * HISTOGRAM_WIDTH // max(counts))
        mark = "  > data.max_prompt_tokens" if first > limit else ""
        lines.append(f"{first:>7} - {first + width - 1:>7}  {bar:<{HISTOGRAM_WIDTH}} {count}{mark}")
    return lines


def _counts_table(prompts: PromptSet) -> Table:
    table = Table()
    table.add_column("rows")
    table.add_column("", justify="right")
    table.add_row("read", str(prompts.num_rows))
    for reason, count in sorted(prompts.dropped.items()):
        table.add_row(f"dropped: {reason}", str(count))
    if prompts.num_truncated:
        table.add_row("kept, but cut", str(prompts.num_truncated))
    table.add_row("kept", str(len(prompts.prompts)))
    return table


def _benchmark_table(benchmarks: Sequence[Benchmark]) -> Table:
    table = Table(title="benchmarks")
    for heading in ("benchmark", "problems", "samples", "temperature", "top-p", "tokens", "left out"):
        table.add_column(heading)
    for benchmark in benchmarks:
        sampling = benchmark.sampling
        table.add_row(
            benchmark.name,
            str(len(benchmark.prompts)),
            str(benchmark.samples),
            f"{sampling.temperature:g}",
            f"{sampling.top_p:g}",
            str(sampling.max_response_tokens),
            ", ".join(f"{count} {reason}" for reason, count in sorted(benchmark.left_out.items())),
        )
    return table
