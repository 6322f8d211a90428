"""Draw entropy, accuracy, KL, gradient norm and the quadrant shares of one or several runs, from their TensorBoard files."""

import argparse
import sys
from pathlib import Path

from megatron_gppo.plot import PlotError, draw, read_curves


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run.dir of a training run; a line each")
    parser.add_argument("--output", type=Path, default=Path("run.png"), help="PNG to write (%(default)s)")
    args = parser.parse_args()
    if args.output.suffix != ".png":
        parser.error(f"--output {args.output} does not end in .png")
    if not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: there is no folder {args.output.parent}")
    try:
        draw({str(run): [read_curves(run)] for run in args.runs}, args.output)
    except PlotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
