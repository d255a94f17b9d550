"""The lottery ticket, NNI's LotteryTicketPruner (Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable
Neural Networks", ICLR 2019, arXiv 1803.03635, section 1: iterative pruning by rounds of train, prune, reset).

Round 0 trains the dense network. Round k of n prunes each layer to the share 1 - (1 - P)^(k/n) of its weights that ended the
round before with the least magnitude, sets what is left back to its initial values, and trains again. That is NNI's schedule:
every round prunes the same share 1 - (1 - P)^(1/n) of the survivors, in every layer; with --scope erk each layer has a P of its
own, so that the last round has ERK's densities. The paper prunes 20 % a round, and half of that in the output layer. A pruned
weight never returns. Biases and batch norms are not pruned, but set back.
--rewind-epoch k sets back to the end of epoch k of round 0 instead (Frankle et al., "Linear Mode Connectivity and the Lottery
Ticket Hypothesis", ICML 2020); each round still trains all epochs with the whole schedule of the learning rate.
On the command line, --last-round k stops after round k, and --chain DIR shares finished rounds among such runs, to the bit. The
run's folder holds rounds.json, a list with the sparsity and accuracy of each round, and ticket.pt, the winning ticket: the
state dict that the last round began with, whose zeros are the mask.
"""

import copy
import json
from pathlib import Path

from deploy.files import write_json, write_tensors
from pruners import processes
from pruners.compressor import Compressor

from ._chain import Chain, add_chain_flag
from ._densities import add_scope_flag
from ._flags import count, positive
from ._one_shot import OneShot, add_layer_flags


def sparsity_at(k, final, rounds):
    """The share of zeros in round k: 1 - (1 - final)^(k / rounds), and exactly `final` in the last."""
    return final if k == rounds else 1 - (1 - final) ** (k / rounds)


class LotteryTicketPruner(Compressor):
    """LotteryTicketPruner(model, config_list, optimizer=None, lr_scheduler=None, reset_weights=True).

    Config keys prune_iterations (equal in all entries), sparsity, op_types, op_names, exclude. The state of model, optimizer
    and scheduler at construction, or at the last save_rewind_point(), is what each round goes back to; reset_weights=False
    goes on from the trained weights instead.
    """

    REQUIRED = ('prune_iterations', 'sparsity')
    FILTERS = False

    @staticmethod
    def score(weight):
        """|w|"""
        return weight.abs()

    def __init__(self, model, config_list, optimizer=None, lr_scheduler=None, reset_weights=True):
        super().__init__(model, config_list, optimizer)
        counts = sorted({entry['prune_iterations'] for entry in self.entries.values()})
        if len(counts) > 1:
            raise ValueError(f'prune_iterations must be equal in all entries of config_list, got {counts}')
        self.iterations = counts[0]
        self.round = None  # none has begun
        self.final = self.sparsity  # {layer: share of zeros in the last round}
        self.sparsity = dict.fromkeys(self.final, 0.0)
        self.lr_scheduler = lr_scheduler
        self.reset_weights = reset_weights
        self.save_rewind_point()

    def get_prune_iterations(self):
        """The rounds: 0, which is dense, to prune_iterations."""
        return range(self.iterations + 1)

    def prune_iteration_start(self):
        """Begin the next round: the masks from the weights as they are, then back to the beginning. Round 0 changes no weight.

        From then on the masks hold, also where compress() was not called. Raises ValueError when all rounds are over.
        """
        number = 0 if self.round is None else self.round + 1
        if number > self.iterations:
            raise ValueError(f'all {self.iterations} rounds of pruning, after the dense one, are over')
        self.round = number
        self.hook()
        if number:
            self.sparsity = {name: sparsity_at(number, final, self.iterations) for name, final in self.final.items()}
            self.update_mask()
            if self.reset_weights:
                self.reset()

    def go_on_in_round(self, number):
        """Say that round `number` has begun, as a file says whose weights and masks will be loaded."""
        self.round = number

    def what_is_reset(self):
        """{name: the model, and the optimizer and scheduler if there are any}."""
        owners = {'model': self.model, 'optimizer': self.optimizer, 'lr_scheduler': self.lr_scheduler}
        return {name: owner for name, owner in owners.items() if owner is not None}

    def save_rewind_point(self):
        """From now on a round goes back to the present state of model, optimizer and scheduler: late rewinding."""
        self.initial = {name: copy.deepcopy(owner.state_dict()) for name, owner in self.what_is_reset().items()}

    def load_rewind_point(self, state):
        """From now on a round goes back to this state dict of the model."""
        self.initial['model'] = state

    def reset(self):
        """Back to the rewind point, under the masks."""
        for name, owner in self.what_is_reset().items():
            if name in self.initial:
                owner.load_state_dict(copy.deepcopy(self.initial[name]))
        self.apply()

    def ticket(self):
        """The winning ticket of this round: the state dict of the rewind point times the masks."""
        state = {name: tensor.clone() for name, tensor in self.initial['model'].items()}
        for name, masks in self.masks.items():
            state[f'{name}.weight' if name else 'weight'].mul_(masks['weight'])
        return state

    def export_ticket(self, model_path, mask_path=None):
        """Save the winning ticket, and its masks, in the form of export_model(), which saves the trained network."""
        write_tensors({name: tensor.cpu() for name, tensor in self.ticket().items()}, Path(model_path))
        if mask_path is not None:
            write_tensors(self.plain_masks(), Path(mask_path))


class Method(OneShot):
    PRUNER = LotteryTicketPruner
    SCOPES = ('layer', 'erk')
    DEFAULTS = {'model': 'lenet300_100', 'dataset': 'mnist', 'epochs': 50, 'batch_size': 60, 'ptarget': 0.96, 'clip': 0.0}
    DEFAULTS |= {'optimizer': 'adam', 'lr': 1.2e-3, 'lr_schedule': 'constant', 'wd': 0.0}

    def __init__(self, args):
        super().__init__(args)
        last = args.prune_iterations if args.last_round is None else args.last_round
        if last > args.prune_iterations:
            raise ValueError(f'--last-round {last} is above --prune-iterations {args.prune_iterations}')
        if args.rewind_epoch > args.epochs:
            raise ValueError(f'--rewind-epoch {args.rewind_epoch} is not within the {args.epochs} epochs of round 0')
        self.rounds = last + 1  # with the dense one
        self.chain = Chain(args, free=['last_round'])
        self.round = 0

    @classmethod
    def add_args(cls, parser):
        add = parser.add_argument
        shown = ' (default: %(default)s)'
        add('--prune-iterations', type=positive, default=10, metavar='N', help='n, rounds after the dense one' + shown)
        add('--last-round', type=count, metavar='K', help='stop after round K, as the first part of the whole (default: N)')
        add('--rewind-epoch', type=count, default=0, metavar='K', help='set back to the end of epoch K of round 0' + shown)
        add_chain_flag(parser, 'runs of several --last-round')
        add_layer_flags(parser)
        add_scope_flag(parser, cls.SCOPES)

    def config_list(self, model):
        return [entry | {'prune_iterations': self.args.prune_iterations} for entry in super().config_list(model)]

    def after_epoch(self, epoch):
        if self.pruner is not None and self.round == 0 and epoch + 1 == self.args.rewind_epoch:
            self.pruner.save_rewind_point()

    def state_dict(self):
        state = super().state_dict()
        if self.pruner is not None and self.args.rewind_epoch > 0:
            state['rewind'] = self.pruner.initial['model']
        return state

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if 'rewind' in state:
            self.pruner.load_rewind_point(state['rewind'])

    def run(self, job):
        """Each round is a stage; what comes before the last stage that has ended is not needed (see _chain.py)."""
        self.pruner = LotteryTicketPruner(job.model, self.config_list(job.model))
        first = self.chain.first_round(job, self.rounds)
        self.pruner.go_on_in_round(first)
        for number in range(first, self.rounds):
            self.round = number
            if number > first:
                self.pruner.prune_iteration_start()
            job.fit(self, f'round{number}')
            self.chain.add_round(job, number)
            if processes.rank() == 0:
                write_json(rounds_of(job), job.folder / 'rounds.json')
        self.pruner.export_ticket(job.folder / 'ticket.pt')


def rounds_of(job):
    """What log.jsonl says of each round: sparsity, accuracy after its last epoch, and the best of its epochs."""
    text = (job.folder / 'log.jsonl').read_text()
    lines = [json.loads(line) for line in text.splitlines()[: job.done['epochs']]]
    rounds = []
    for stage in dict.fromkeys(line['stage'] for line in lines):
        epochs = [line for line in lines if line['stage'] == stage]
        rounds.append(
            {
                'round': int(stage.removeprefix('round')),
                'sparsity': epochs[-1]['sparsity'],
                'accuracy': epochs[-1]['accuracy'],
                'best_accuracy': max(line['accuracy'] for line in epochs),
            }
        )
    return rounds
