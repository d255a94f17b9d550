"""The one-shot criteria by the names of base_algo and pruning_algorithm."""

from pruners.compressor import Compressor
from pruners.config_list import suggestion

from .apoz import ActivationAPoZRankFilterPruner
from .fpgm import FPGMPruner
from .l1_filter import L1FilterPruner
from .l2_filter import L2FilterPruner
from .level import LevelPruner
from .mean_activation import ActivationMeanRankFilterPruner
from .slim import SlimPruner
from .taylor_fo import TaylorFOWeightFilterPruner

ALGORITHMS = {
    'level': LevelPruner,
    'slim': SlimPruner,
    'l1': L1FilterPruner,
    'l2': L2FilterPruner,
    'fpgm': FPGMPruner,
    'taylorfo': TaylorFOWeightFilterPruner,
    'apoz': ActivationAPoZRankFilterPruner,
    'mean_activation': ActivationMeanRankFilterPruner,
}


def algorithm(name: str) -> type[Compressor]:
    """The one-shot pruner class of a base_algo or pruning_algorithm. Raises ValueError for another name."""
    if name not in ALGORITHMS:
        raise ValueError(
            f'there is no pruning algorithm {name!r}{suggestion(name, ALGORITHMS)}; there are {", ".join(ALGORITHMS)}'
        )
    return ALGORITHMS[name]
