"""Convert an HF Qwen folder to a torch_dist checkpoint that trains at any layout. Needs no GPU and no torchrun."""

import argparse
import sys

from megatron_gppo.interrupts import say_interrupted_before_it_began

say_interrupted_before_it_began()  # until run() takes over

from megatron_gppo.convert import convert_hf_to_megatron, describe_hf_to_megatron  # noqa: E402
from megatron_gppo.convert.command_line import DTYPES, add_common_arguments, positive_int, run  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--hf-path", required=True, metavar="DIR", help="folder with config.json, safetensors and tokenizer"
    )
    add_common_arguments(parser)
    for name, meaning in (("tp", "tensor"), ("pp", "pipeline"), ("ep", "expert")):
        parser.add_argument(
            f"--{name}",
            type=positive_int,
            default=1,
            metavar="N",
            help=f"check that the model admits this {meaning}-parallel size; the output loads at any",
        )
    args = parser.parse_args()
    common = {
        "tp": args.tp,
        "pp": args.pp,
        "ep": args.ep,
        "dtype": DTYPES.get(args.dtype),
        "overwrite": args.overwrite,
    }

    def convert() -> str:
        if args.dry_run:
            return describe_hf_to_megatron(args.hf_path, args.output, **common)
        converted = convert_hf_to_megatron(args.hf_path, args.output, **common, verify=args.verify, progress=True)
        return f"wrote {args.output}: {converted}"

    return run(convert, args.output)


if __name__ == "__main__":
    sys.exit(main())
