"""Convert a torch_dist checkpoint, converted or saved by training, to an HF folder. Needs no GPU and no torchrun."""

import argparse
import sys

from megatron_gppo.interrupts import say_interrupted_before_it_began

say_interrupted_before_it_began()  # until run() takes over

from megatron_gppo.convert import convert_megatron_to_hf, describe_megatron_to_hf  # noqa: E402
from megatron_gppo.convert.command_line import DTYPES, add_common_arguments, num_bytes, run  # noqa: E402

EXPERTS = {"separate": False, "stacked": True}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="folder with metadata.json and hf/")
    add_common_arguments(parser)
    parser.add_argument(
        "--max-shard-size", type=num_bytes, default="5GB", metavar="SIZE", help="largest file, as 500MB; default 5GB"
    )
    parser.add_argument(
        "--experts", choices=EXPERTS, help="a tensor an expert, or one for all of a layer; default: as the source model"
    )
    args = parser.parse_args()
    common = {
        "dtype": DTYPES.get(args.dtype),
        "stacked_experts": EXPERTS.get(args.experts),
        "overwrite": args.overwrite,
    }

    def convert() -> str:
        if args.dry_run:
            return describe_megatron_to_hf(args.checkpoint, args.output, **common)
        converted = convert_megatron_to_hf(
            args.checkpoint,
            args.output,
            **common,
            max_shard_bytes=args.max_shard_size,
            verify=args.verify,
            progress=True,
        )
        return f"wrote {args.output}: {converted}"

    return run(convert, args.output)


if __name__ == "__main__":
    sys.exit(main())
