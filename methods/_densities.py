"""How many weights each layer keeps, when the share of zeros in the whole network is given.

uniform  d_l = d, the same density in every layer
erk      d_l = eps p_l with p_l = sum(shape of l) / prod(shape of l), at most 1: Erdos-Renyi-Kernel (Evci et al., "Rigging the
         Lottery: Making All Tickets Winners", ICML 2020, arXiv 1911.11134, section 3), for linear layers Erdos-Renyi; eps is
         such that sum d_l n_l is the number of weights that are kept
global   no densities: the weights of all layers are ranked together

Layers that are to stay dense count as well: the others keep fewer, and the network has the zeros that were asked for.
Deviation: the released code rounds each layer by itself; here the counts add up to n - round(s n) of all n weights.
"""

import math


def kernel_ratio(shape):
    """p_l = sum(shape) / prod(shape), of a weight [out, in, ...]."""
    return sum(shape) / math.prod(shape)


def erk(shapes, kept, dense=()):
    """{name: shape} -> {name: density} by ERK, `kept` weights in all.

    While eps p_l is above 1 somewhere, the layers of largest p_l become dense. dense: names of those that are so at first.
    """
    dense = {*dense}
    while True:
        ratios = {name: kernel_ratio(shape) for name, shape in shapes.items() if name not in dense}
        left = kept - sum(math.prod(shapes[name]) for name in dense)
        eps = left / max(sum(sum(shapes[name]) for name in ratios), 1)  # as p_l n_l = sum(shape of l)
        too_high = [name for name, ratio in ratios.items() if eps * ratio > 1 and ratio == max(ratios.values())]
        if not too_high:
            return {name: 1.0 if name in dense else eps * ratios[name] for name in shapes}
        dense |= {*too_high}


def uniform(shapes, kept, dense=()):
    """{name: shape} -> {name: density}, the same density in all layers but those named in `dense`; `kept` weights in all."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    left = kept - sum(sizes[name] for name in dense)
    density = left / max(sum(size for name, size in sizes.items() if name not in dense), 1)
    return {name: 1.0 if name in dense else density for name in shapes}


DISTRIBUTIONS = {'erk': erk, 'uniform': uniform}


def kept_counts(shapes, ratio, distribution, dense=(), limits=None):
    """{name: shape} -> {name: how many weights the layer keeps}, in all n - round(ratio n) of the n weights.

    limits: {name: the most that a layer can keep} (default: all of its weights), in all enough.
    Raises ValueError when the layers in `dense` alone have more weights than are to be kept.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = sum(sizes.values())
    kept = total - round(ratio * total)
    if kept < sum(sizes[name] for name in dense):
        layers = ', '.join(dense)
        raise ValueError(
            f'{layers} alone would keep more than the {kept} of {total} weights that are left: let it be pruned too'
        )
    densities = DISTRIBUTIONS[distribution](shapes, kept, dense)
    return allot({name: densities[name] * size for name, size in sizes.items()}, kept, limits or sizes)


def allot(shares, total, limits):
    """{name: real share} -> {name: whole number}, `total` in all: rounded down, and the rest to the largest remainders.

    No number is above its limit; the limits must add up to `total` or more, and no share may be above its own.
    """
    counts = {name: min(math.floor(share), limits[name]) for name, share in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name])  # sorted() is stable: the first layer of equals
    missing = total - sum(counts.values())
    while missing > 0:
        raised = [name for name in by_remainder if counts[name] < limits[name]][:missing]
        if not raised:
            raise ValueError(f'{total} weights are to be kept, but the layers can keep {sum(limits.values())} only')
        for name in raised:
            counts[name] += 1
        missing -= len(raised)
    return counts


def add_flags(parser, dense=()):
    """--distribution, and --dense-layers with the paper's default."""
    add = parser.add_argument
    add('--distribution', choices=list(DISTRIBUTIONS), default='erk', help='densities of the layers (default: %(default)s)')
    text = f'layers that are not pruned; the others have more zeros instead (default: {" ".join(dense) or "none"})'
    add('--dense-layers', nargs='*', choices=['first', 'last'], default=list(dense), help=text)


def dense_names(names, places):
    """The names of the layers that --dense-layers means: `names` in their order, places 'first' or 'last'."""
    ends = {'first': names[0], 'last': names[-1]}
    return list(dict.fromkeys(ends[place] for place in places))


def scope(text):
    """The value of --scope; --distribution says the same, with its own word for `layer`."""
    return 'layer' if text == 'uniform' else text


def add_scope_flag(parser, scopes):
    """--scope, the first of `scopes` by default: 'layer', 'global', 'erk'."""
    meanings = {
        'layer': 'the same share of each layer (also called uniform)',
        'global': 'all ranked together',
        'erk': 'densities by ERK (Erdos-Renyi-Kernel)',
    }
    text = '; '.join(f'{name}: {meanings[name]}' for name in scopes) + ' (default: %(default)s)'
    names = ['--scope', '--distribution'] if 'erk' in scopes else ['--scope']
    parser.add_argument(*names, dest='scope', type=scope, choices=scopes, default=scopes[0], help=text)
