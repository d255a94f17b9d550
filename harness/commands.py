"""The commands of main.py that train nothing: --publish RUN, --evaluate FILE, --shrink RUN, --sparse-compile RUN."""

import sys

from . import published, shrunk, sparse_run


def carry_out(args, device):
    """args: of args.parse_command(). Exits with status 1 where a file is not what it says."""
    if args.command == 'publish':
        published.publish(args.publish, args.to)
    elif args.command == 'shrink':
        shrunk.shrink_run(args.shrink, args.round_to, args.pt2, args.onnx, args.torchscript, args.threads)
    elif args.command == 'sparse-compile':
        sparse_run.compile_run(args, device)
    elif not published.evaluate(args, device):
        sys.exit(1)
