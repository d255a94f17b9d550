"""Rounds of training that runs of several targets share: round k does not depend on how many rounds follow it.

A chain is a folder with round0.pt, round1.pt, ...: the checkpoint at the end of each round, with the log so far and the
arguments. A run goes on after the last round that it finds there, to the bit as if it had trained them all itself.
"""

from pathlib import Path

from deploy import files
from deploy.files import FileError, read_tensors, write_tensors
from pruners import processes

from ._flags import differences


def add_chain_flag(parser, runs):
    """runs: what the runs that share rounds differ in."""
    help = f'folder in which {runs} share their rounds; {{seed}} is filled in'
    parser.add_argument('--chain', metavar='DIR', help=help)


class Chain:
    """The rounds 0, 1, ... of a run, each a stage `round0`, `round1`, ... of job.fit(), and the folder that they are shared in.

    args: the run's arguments; args.chain is the folder, {seed} in it stands for the seed, None for no sharing.
    free: names of arguments in which the runs that share rounds may differ.
    """

    def __init__(self, args, free):
        self.folder = None if args.chain is None else Path(args.chain.replace('{seed}', str(args.seed)))
        self.free = {'chain', *free}

    def first_round(self, job, number):
        """The round that a run of `number` rounds begins with: job.fit() then loads what is there of it.

        It is the last round that has ended in the run's folder or, before any training there, in the chain; never the run's
        last round, whose end may depend on the target. Raises FileError where the chain is of other arguments.
        """
        ended = [k for k in range(number) if stage_file(job, k).exists()]
        shared = [k for k in range(number - 1) if self.folder is not None and self.file(k).exists()]
        ended, shared = processes.same([ended, shared])
        if shared and not (job.folder / 'checkpoint.pt').exists():
            self.copy_round(job, max(shared))
            return max(shared)
        return max(ended, default=0)

    def copy_round(self, job, k):
        """Put the end of round k, and the log until then, where job.fit() looks for a stage that has ended."""
        state = read_tensors(self.file(k))
        changed = differences(self.compared(state.pop('args')), self.compared(vars(job.args)))
        if changed:
            raise FileError(f'{self.folder} holds rounds of other arguments ({"; ".join(changed)}); take another --chain')
        log = state.pop('log').encode()
        files.write_atomically(job.folder / 'log.jsonl', lambda file: file.write(log))
        write_tensors(state, stage_file(job, k))
        processes.wait()

    def add_round(self, job, k):
        """Add round k, which has just ended, to the folder, unless it is there or nothing is shared."""
        if self.folder is None or processes.rank() != 0 or self.file(k).exists():
            return
        ended = stage_file(job, k)
        state = read_tensors(ended if ended.exists() else job.folder / 'checkpoint.pt')
        lines = (job.folder / 'log.jsonl').read_text().splitlines(keepends=True)
        log = ''.join(lines[: job.done['epochs']])
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(state | {'args': vars(job.args), 'log': log}, self.file(k))

    def file(self, k):
        return self.folder / f'round{k}.pt'

    def compared(self, args):
        """The arguments that must be equal."""
        return {name: value for name, value in args.items() if name not in self.free}


def stage_file(job, k):
    """Where job.fit() keeps the end of the stage of round k, once the next one has begun."""
    return job.folder / f'stage-round{k}.pt'
