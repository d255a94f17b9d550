"""STR, soft threshold weight reparameterization (Kusupati et al., ICML 2020, arXiv 2002.03231).

Each layer computes with w~ = sign(w) relu(|w| - sigmoid(r)); r is one trained number a layer, with the learning rate and the
weight decay of the weights (g = dL/dw~):
dL/dw = g 1[|w| > sigmoid(r)],  dL/dr = -sigmoid'(r) sum(g sign(w) 1[|w| > sigmoid(r)])
There is no target: decay draws r towards 0, thresholds rise, and the share of zeros follows from --r-init and --wd.
The authors' ResNet-50 for ImageNet begins at r = -3200 (90 %: --wd 2.2517578e-5), where in float32 sigmoid and its slope are 0:
only decay moves r, until it is about -89. For CIFAR an author advises r near -100 and a decay above 5e-4.
--exact ends on the count after the last epoch, as for asl: with all thresholds multiplied by one factor, exactly
floor((n - 1) ptarget) + 1 of n weights are zero.
"""

import torch

from sparse_utils import attach, bake, global_threshold, layers_to_prune

from . import Method as Base

TINY = 1e-12  # a threshold that cannot be seen beside weights, where there is none


def soft_threshold(weight, r):
    """w~, of the weight's shape, differentiable in both."""
    return weight.sign() * torch.relu(weight.abs() - torch.sigmoid(r))


class SoftThreshold(torch.nn.Module):
    """The parametrization of a layer's weight, with its r."""

    def __init__(self, r):
        super().__init__()
        self.r = torch.nn.Parameter(r)

    def forward(self, weight):
        return soft_threshold(weight, self.r)


class Method(Base):
    def __init__(self, args):
        super().__init__(args)
        self.layers = {}
        self.weights = {}
        self.operators = {}
        self.steps_left = 0

    @staticmethod
    def add_args(parser):
        text = 'r of each layer at the start (default: %(default)s)'
        parser.add_argument('--r-init', type=float, default=-100.0, metavar='R', help=text)
        parser.add_argument('--exact', action='store_true', help='end on the exact count of zeros')

    def prepare(self, model, steps, args):
        self.finalize(model)
        self.layers = layers_to_prune(model, self.args.pthres)
        names = {layer.weight: name for name, layer in self.layers.items()}  # a tied weight has one threshold
        self.weights = {name: weight for weight, name in names.items()}
        for name, weight in self.weights.items():
            self.operators[name] = SoftThreshold(weight.new_full((), self.args.r_init))
        for layer in self.layers.values():
            attach(layer, self.operators[names[layer.weight]])
        self.steps_left = steps

    def param_groups(self, model, args):
        """With r decayed, although it is no matrix."""
        thresholds = [operator.r for operator in self.operators.values()]
        own = {id(r) for r in thresholds}
        groups = super().param_groups(model, args)
        groups = [group | {'params': [p for p in group['params'] if id(p) not in own]} for group in groups]
        return [*(group for group in groups if group['params']), {'params': thresholds, 'weight_decay': args.wd}]

    def after_step(self, step, batch):
        self.steps_left -= 1

    def after_epoch(self, epoch):
        if self.args.exact and self.steps_left == 0:
            self.finish_exactly()

    @torch.no_grad()
    def finish_exactly(self):
        """Multiply all thresholds by the factor that gives the count, and write the result into the weights, under T = 0."""
        thresholds = {name: torch.sigmoid(operator.r) + TINY for name, operator in self.operators.items()}
        relative = {name: weight / thresholds[name] for name, weight in self.weights.items()}
        factor = global_threshold(list(relative.values()), self.args.ptarget)
        for name, weight in self.weights.items():
            kept = (weight.abs() - factor * thresholds[name]).clamp(min=torch.finfo(weight.dtype).tiny)
            weight.copy_(weight.sign() * kept * (relative[name].abs() > factor))
            self.operators[name].r.fill_(-torch.inf)

    def metrics(self):
        thresholds = torch.stack([torch.sigmoid(operator.r) for operator in self.operators.values()])
        return {'largest_threshold': thresholds.max().item(), 'smallest_threshold': thresholds.min().item()}

    def finalize(self, model):
        bake(self.layers.values())
        self.layers = {}
        self.weights = {}
        self.operators = {}
        return model

    def facts(self):
        return {} if self.args.exact else {'target': 'none: the share of zeros follows from --r-init and --wd'}

    def state_dict(self):
        return {'steps_left': self.steps_left}

    def load_state_dict(self, state):
        self.steps_left = state['steps_left']
