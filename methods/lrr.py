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

from ._chain import Chain, add_chain_flag
from ._flags import count, fraction
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
        self.chain = Chain(args, free=['ptarget'])
        self.round = 0
        self.rewind = None  # the state dict that each round goes back to, None for the trained weights

    @staticmethod
    def add_args(parser):
        add = parser.add_argument
        add('--rate', type=fraction, default=0.2, help='share of the surviving weights pruned a round (default: %(default)s)')
        add('--rewind-epoch', type=count, metavar='K', help='set weights back too, to those after epoch K of round 0')
        add_chain_flag(parser, 'runs of several targets')

    def run(self, job):
        """Each round is a stage. What comes before the last stage that has ended is in that stage's file, and is not needed."""
        if self.args.rewind_epoch == 0:
            self.rewind = copy_of_state(job.model)
        first = self.chain.first_round(job, len(self.targets))
        for number in range(first, len(self.targets)):
            self.round = number
            if number > first:
                self.prune(job.model)
            job.fit(self, f'round{number}')
            if number < len(self.targets) - 1:  # the end of the last one depends on the target
                self.chain.add_round(job, number)

    def prune(self, model):
        """The masks of this round, by the weights that the round before ended with; then the rewinding."""
        masks = magnitude_masks(self.weights, self.targets[self.round], 'global', self.state_dict()['masks'])
        if self.rewind is not None:
            model.load_state_dict(self.rewind)
        self.load_state_dict({'masks': masks})

    def prepare(self, model, steps, args):
        before = self.state_dict()  # a stage goes on with the masks of the one before
        super().prepare(model, steps, args)
        if before['masks']:
            self.load_state_dict(before)

    def after_epoch(self, epoch):
        if self.round == 0 and epoch + 1 == self.args.rewind_epoch:
            self.rewind = copy_of_state(self.fit.model)

    def state_dict(self):
        rewind = {} if self.rewind is None else {'rewind': self.rewind}
        return super().state_dict() | rewind

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.rewind = state.get('rewind', self.rewind)


def copy_of_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
