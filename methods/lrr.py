"""Learning-rate rewinding (Renda, Frankle, Carbin, "Comparing Rewinding and Fine-tuning", ICLR 2020; arXiv 2003.02389).

Round 0 trains the dense network. Each further round prunes --rate of the surviving weights by global magnitude, sets the
schedule of the learning rate back to its start and trains as long again with the masks fixed: after round r a share
1 - (1 - rate)^r is zero. The last round prunes exactly round(ptarget n) of all n weights. 90 % at a rate of 20 % takes eleven
rounds after round 0: ten of 20 %, and one to 90 %. Pruned weights are zero after every step, as in gmp.py.
--rewind-epoch k also sets all parameters and statistics back, with each round, to what they were after epoch k of round 0
(k = 0: to the initial ones), under the round's masks.
--chain DIR shares rounds among runs of several targets: DIR holds the end of each round but the last (those do not depend on
the target), and a run goes on after the last one it finds there, to the bit as if it had trained them all itself.
Deviations: the paper's weight rewinding to epoch k goes on with the schedule from epoch k; here each round is a whole training.
The count of a round is rounded from its total share, so that roundings do not add up. Each round has a new optimizer.
"""

import math
from pathlib import Path

from deploy import files
from deploy.files import FileError, read_tensors, write_tensors
from pruners import processes

from ._flags import count, differences, fraction
from .gmp import Masking, magnitude_masks


def rounds(target, rate=0.2):
    """The share of zeros in each round: 0, rate, 1 - (1 - rate)^2, ..., target."""
    number = math.ceil(math.log(1 - target) / math.log(1 - rate) - 1e-9)
    return [1 - (1 - rate) ** r for r in range(max(number, 1))] + [target]


class Method(Masking):
    def __init__(self, args):
        super().__init__(args)
        if args.rewind_epoch is not None and args.rewind_epoch > args.epochs:
            raise ValueError(f'--rewind-epoch {args.rewind_epoch} is not within the {args.epochs} epochs of round 0')
        self.targets = rounds(args.ptarget, args.rate)
        self.chain = None if args.chain is None else Path(args.chain.replace('{seed}', str(args.seed)))
        self.round, self.rewind = 0, None

    @staticmethod
    def add_args(parser):
        add = parser.add_argument
        add('--rate', type=fraction, default=0.2, help='share of the surviving weights pruned a round (default: %(default)s)')
        add('--rewind-epoch', type=count, metavar='K', help='set weights back too, to those after epoch K of round 0')
        add('--chain', metavar='DIR', help='folder in which runs of several targets share their rounds; {seed} is filled in')

    def prepare(self, model, steps, args):
        masks = self.state_dict()  # a stage goes on with the masks of the one before
        super().prepare(model, steps, args)
        if masks['masks']:
            self.load_state_dict(masks)

    def after_epoch(self, epoch):
        if self.round == 0 and epoch + 1 == self.args.rewind_epoch:
            self.rewind = clone(self.fit.model)

    def state_dict(self):
        return super().state_dict() | ({} if self.rewind is None else {'rewind': self.rewind})

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.rewind = state.get('rewind', self.rewind)

    def run(self, job):
        """Each round is a stage. What comes before the last stage that has ended is in that stage's file, and is not needed."""
        if self.args.rewind_epoch == 0:
            self.rewind = clone(job.model)
        first = self.take_over(job)
        for number in range(first, len(self.targets)):
            self.round = number
            if number > first:
                self.prune(job.model)
            job.fit(self, f'round{number}')
            if self.chain is not None and number < len(self.targets) - 1:
                self.keep(job)

    def prune(self, model):
        """The masks of this round, by the weights that the round before ended with; then the rewinding."""
        masks = magnitude_masks(self.weights, self.targets[self.round], 'global', self.state_dict()['masks'])
        if self.rewind is not None:
            model.load_state_dict(self.rewind)
        self.load_state_dict({'masks': masks})

    def take_over(self, job):
        """The round to begin with: the last that has ended in the run's folder or, before any training there, in the chain."""
        ended = [r for r in range(len(self.targets)) if stage_file(job, r).exists()]
        kept = [r for r in range(len(self.targets) - 1) if self.chain is not None and self.chain_file(r).exists()]
        ended, kept = processes.same([ended, kept])
        if not kept or (job.folder / 'checkpoint.pt').exists():
            return max(ended, default=0)
        last = max(kept)
        state = read_tensors(self.chain_file(last))
        if changed := differences(comparable(state.pop('args')), comparable(vars(job.args))):
            raise FileError(f'{self.chain} holds rounds of other arguments ({"; ".join(changed)}); take another --chain')
        lines = state.pop('log').encode()
        files.write_atomically(job.folder / 'log.jsonl', lambda file: file.write(lines))
        write_tensors(state, stage_file(job, last))  # where job.fit() looks for a stage that has ended
        processes.wait()
        return last

    def keep(self, job):
        """Add the round that has just ended to the chain: its checkpoint, the log so far, and the arguments."""
        path, ended = self.chain_file(self.round), stage_file(job, self.round)
        if processes.rank() == 0 and not path.exists():
            state = read_tensors(ended if ended.exists() else job.folder / 'checkpoint.pt')
            lines = (job.folder / 'log.jsonl').read_text().splitlines(keepends=True)[: job.done['epochs']]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(state | {'args': vars(job.args), 'log': ''.join(lines)}, path)

    def chain_file(self, number):
        return self.chain / f'round{number}.pt'


def stage_file(job, number):
    return job.folder / f'stage-round{number}.pt'


def comparable(args):
    return {name: value for name, value in args.items() if name not in ('ptarget', 'chain')}


def clone(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
