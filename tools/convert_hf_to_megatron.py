"""Convert an HF Qwen folder to a torch_dist checkpoint that trains at any layout. Needs no GPU and no torchrun."""

import argparse
import sys

from megatron_gppo.convert import ConvertError, convert_hf_to_megatron


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hf-path", required=True, help="folder with config.json, safetensors and tokenizer")
    parser.add_argument("--output", required=True, help="folder to write; must not exist or be empty")
    parser.add_argument("--tp", type=_size, default=1, help="tensor-parallel size to check the model against")
    parser.add_argument("--pp", type=_size, default=1, help="pipeline-parallel size to check the model against")
    parser.add_argument("--ep", type=_size, default=1, help="expert-parallel size to check the model against")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --output, when all is written")
    args = parser.parse_args()
    try:
        convert_hf_to_megatron(
            args.hf_path, args.output, tp=args.tp, pp=args.pp, ep=args.ep, overwrite=args.overwrite, progress=True
        )
    except ConvertError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {args.output} is as it was; run the same command to start again", file=sys.stderr)
        return 130
    print(f"wrote {args.output}")
    return 0


def _size(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


if __name__ == "__main__":
    sys.exit(main())
