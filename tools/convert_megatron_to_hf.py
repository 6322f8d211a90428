"""Convert a torch_dist checkpoint, converted or saved by training, to an HF folder. Needs no GPU and no torchrun."""

import argparse
import sys

from megatron_gppo.convert import ConvertError, convert_megatron_to_hf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, help="folder with metadata.json and hf/")
    parser.add_argument("--output", required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output, when all is written")
    args = parser.parse_args()
    try:
        convert_megatron_to_hf(args.checkpoint, args.output, overwrite=args.overwrite, progress=True)
    except ConvertError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {args.output} is as it was; run the same command to start again", file=sys.stderr)
        return 130
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
