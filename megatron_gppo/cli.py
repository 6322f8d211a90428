"""The megatron-gppo command: ``megatron-gppo train`` and ``megatron-gppo eval``."""

import argparse
import subprocess
import sys
from collections.abc import Sequence

import torch

from megatron_gppo.config import load_config
from megatron_gppo.errors import REPORTED, exit_status


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
        "--nproc-per-node", type=int, metavar="N", help="ranks; default: the GPUs, or tp * pp without any"
    )
    evaluate = commands.add_parser(
        "eval", help="evaluate a model on data.eval", description="Prints avg@k on data.eval."
    )
    for command in (train, evaluate):
        command.add_argument("--config", required=True, metavar="FILE", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace a value of the file")
    train.add_argument("--dry-run", action="store_true", help="check everything, print the plan, and stop")
    options = parser.parse_args(arguments)

    try:
        if options.command == "train":
            return _train(options)
        return _evaluate(options)
    except REPORTED as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_status(error)
    except KeyboardInterrupt:
        return 130


def _train(options: argparse.Namespace) -> int:
    layout = load_config(options.config, options.overrides).parallel
    ranks = options.nproc_per_node or torch.cuda.device_count() or layout.tp * layout.pp
    module = ["megatron_gppo.train", "--config", options.config, *options.overrides]
    if options.dry_run:
        from megatron_gppo import train

        return train.main([*module[1:], "--dry-run", "--world-size", str(ranks)])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    process = subprocess.Popen([*launcher, *module])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # the terminal has told torchrun, too, which ends when its ranks have saved
            continue


def _evaluate(options: argparse.Namespace) -> int:
    from megatron_gppo.evaluate import run_evaluation

    run_evaluation(load_config(options.config, options.overrides))
    return 0


if __name__ == "__main__":
    sys.exit(main())
