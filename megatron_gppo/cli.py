"""The megatron-gppo command: ``train``, ``eval``, ``eval compare`` and ``data preview``."""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from megatron_gppo.config import load_config
from megatron_gppo.rollout.placement import ranks_that_fit


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the command's exit status: 0 done, 1 failed, 2 a mistake in the configuration or the data."""
    parser = argparse.ArgumentParser(prog="megatron-gppo", description="CE-GPPO on Megatron-Core with SGLang rollouts.")
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        help="train on this node",
        description="Starts torchrun on this node; takes what megatron_gppo.train does.",
    )
    train.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="ranks; default: the GPUs that engines leave, or one copy of the model",
    )
    evaluate = commands.add_parser(
        "eval",
        help="evaluate a model on eval.benchmarks and data.eval",
        description="Prints avg@k, pass@k and maj@k, and keeps every response in run.dir/eval. 'megatron-gppo eval compare "
        "A B' compares the reports in two such folders.",
    )
    evaluate.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="a Megatron checkpoint to evaluate instead of model.hf_path"
    )
    preview = (
        commands.add_parser("data", help="look at the data: data preview")
        .add_subparsers(dest="action", required=True)
        .add_parser(
            "preview",
            help="show what training and evaluation see of the data",
            description="Prints the first rows as the model gets them, lengths, and what is dropped and why.",
        )
    )
    preview.add_argument("--rows", type=_count, default=3, metavar="N", help="rows to show (%(default)s)")
    for command in (train, evaluate, preview):
        command.add_argument("--config", required=True, metavar="FILE", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace a value of the file")
    train.add_argument(
        "--dry-run", action="store_true", help="check configuration and layout, print the plan, and stop"
    )
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if (here := str(Path.cwd())) not in sys.path:  # as torchrun has it: a reward function may be in a file here
        sys.path.insert(0, here)
    try:
        if list(arguments[:2]) == ["eval", "compare"]:
            return _compare(arguments[2:])
        options = parser.parse_args(arguments)
        if options.command == "train":
            return _train(options)
        if options.command == "data":
            return _preview(options)
        return _evaluate(options)
    except Exception as error:
        from megatron_gppo.errors import REPORTED, exit_status  # their imports take longer than all others here

        if not isinstance(error, REPORTED):
            raise
        print(f"error: {error}", file=sys.stderr)
        return exit_status(error)
    except KeyboardInterrupt:
        return 130


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rows. Fix: give 0 or more")
    return int(text)


def _train(options: argparse.Namespace) -> int:
    config = load_config(options.config, options.overrides)
    ranks = options.nproc_per_node or ranks_that_fit(config, torch.cuda.device_count())
    arguments = ["--config", options.config, *options.overrides]
    if options.dry_run:
        from megatron_gppo import train

        return train.main([*arguments, "--dry-run", "--world-size", str(ranks)])
    # The ranks say what went wrong, and torchrun would say it again in fifty lines.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # what torchrun does, with a warning
    launch = ["--standalone", "--nproc-per-node", str(ranks), "-m", "megatron_gppo.train", *arguments]
    try:
        torchrun.run(torchrun.parse_args(launch))
    except SignalException as ended:  # the ranks have had the signal, too, and have saved
        return 128 + ended.sigval
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 1
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from megatron_gppo.evaluate.command import run_evaluation

    run_evaluation(load_config(options.config, options.overrides), options.checkpoint)
    return 0


def _compare(arguments: Sequence[str]) -> int:
    from megatron_gppo.evaluate.command import run_comparison

    parser = argparse.ArgumentParser(
        prog="megatron-gppo eval compare", description="Says whether the second model differs from the first."
    )
    parser.add_argument("first", type=Path, help="an evaluation's folder, or its report.json")
    parser.add_argument("second", type=Path, help="another one, on the same problems")
    options = parser.parse_args(arguments)
    run_comparison(options.first, options.second)
    return 0


def _preview(options: argparse.Namespace) -> int:
    from megatron_gppo.preview import preview

    preview(load_config(options.config, options.overrides), options.rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
