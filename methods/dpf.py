"""DPF (Lin, Stich, Barba, Dmitriev, Jaggi, "Dynamic Model Pruning with Feedback", ICLR 2020, arXiv 2006.07253).

w <- w - lr g(w m)      a dense w is trained with the gradient at the pruned point (algorithm 1); momentum and decay act on w
m  keeps the largest |w| of the whole network, renewed every 16 steps at the share of gmp.py's cubic ramp, from 0 zeros on
Weights that are pruned receive gradients too, which is the feedback, so any of them can return. (`gmp --regrow` has w m
as well, but masks the gradient.) The finished network is w m, with exactly round(s n) zeros of all n weights.
The masks are renewed until training ends. An independent port freezes them where its ramp ends, at 3/4 of training (CIFAR-10:
300 epochs, batch 128, lr 0.2 divided by 10 at 150 and 225, decay 1e-4), and leaves the linear layer dense.
"""

from . import gmp
from ._masks import PassThrough


class Method(gmp.Method):
    regrow = True
    operator = PassThrough
    FREQUENCY = 16
    RAMP = (0, 0.75)

    @classmethod
    def add_args(cls, parser):
        cls.add_ramp_flags(parser)
