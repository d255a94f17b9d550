"""Config lists: which layers of a model a pruner takes, and with which settings. NNI's form, checked to the last key."""

import difflib
from collections.abc import Iterable

from torch import nn

# The types that 'default' stands for.
DEFAULT_TYPES = ('Conv1d', 'Conv2d', 'Conv3d', 'ConvTranspose1d', 'ConvTranspose2d', 'ConvTranspose3d', 'Linear', 'Bilinear')
DEFAULT_TYPES += ('PReLU', 'Embedding', 'EmbeddingBag')


def is_share(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1


def is_names(value) -> bool:
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(name, str) for name in value)


def is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_positive(value) -> bool:
    return is_count(value) and value > 0


# What the value of each key must be: the check, and how to say it.
CHECKS = {
    'op_types': (is_names, 'a list of names'),
    'op_names': (is_names, 'a list of names'),
    'exclude': (lambda value: isinstance(value, bool), 'True or False'),
    'sparsity': (is_share, 'a number in [0, 1)'),
    'initial_sparsity': (is_share, 'a number in [0, 1)'),
    'final_sparsity': (is_share, 'a number in [0, 1)'),
    'start_epoch': (is_count, 'a whole number, 0 or more'),
    'end_epoch': (is_count, 'a whole number, 0 or more'),
    'frequency': (is_positive, 'a whole number, 1 or more'),
    'prune_iterations': (is_positive, 'a whole number, 1 or more'),
}


def select_layers(
    model: nn.Module,
    config_list: list[dict],
    required: tuple[str, ...] = ('sparsity',),
    optional: tuple[str, ...] = (),
    types: tuple[str, ...] | None = None,
) -> tuple[dict[str, nn.Module], dict[str, dict]]:
    """The layers that a config list names -> ({name: layer}, {name: the entry that decides about it}), in the model's order.

    A layer matches an entry when its type's name is in `op_types` and its dotted name in `op_names`, as far as the entry has
    them; it needs one of the two. Among the op_types 'default' is DEFAULT_TYPES. The last matching entry decides; where that
    has `exclude: True` the layer is left out. required, optional: the keys of an entry beside these three. types: the types of
    layers that the pruner takes, None for any with a weight. Raises ValueError, naming the entry and what was expected.
    """
    if not isinstance(config_list, (list, tuple)) or not config_list or not all(isinstance(e, dict) for e in config_list):
        raise ValueError(f'config_list must be a list of dicts, one or more, got {config_list!r}')
    chosen = {}
    for number, entry in enumerate(config_list):
        try:
            check_entry(entry, required, optional)
            for name, layer in matches(model, entry, types).items():
                chosen[name] = (layer, entry, number)
        except ValueError as error:
            raise ValueError(f'config_list[{number}] = {entry}: {error}') from None
    pruned = {name: chosen[name] for name, _ in model.named_modules() if name in chosen and not excludes(chosen[name][1])}
    if not pruned:
        raise ValueError('config_list excludes every layer that it names: nothing is left to prune')
    for name, (layer, entry, number) in pruned.items():
        kind, fault = type(layer).__name__, None
        if types is not None and kind not in types:
            fault = f'{name} is a {kind}; this pruner takes {" and ".join(types)} only'
        elif not isinstance(layer._parameters.get('weight'), nn.Parameter):
            fault = f'{name}, a {kind}, has no weight to prune'
        if fault:
            raise ValueError(f'config_list[{number}] = {entry}: {fault}')
    return {name: layer for name, (layer, *_) in pruned.items()}, {name: entry for name, (_, entry, _) in pruned.items()}


def excludes(entry: dict) -> bool:
    return entry.get('exclude', False)


def suggestion(name: str, choices: Iterable[str]) -> str:
    """' (did you mean x?)', or nothing."""
    near = difflib.get_close_matches(str(name), list(choices), 1)
    return f' (did you mean {near[0]!r}?)' if near else ''


def check_entry(entry: dict, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    """Keys and values of one entry. Raises ValueError."""
    allowed = ['op_types', 'op_names', 'exclude', *required, *optional]
    for key, value in entry.items():
        if key not in allowed:
            raise ValueError(f'unknown key {key!r}{suggestion(key, allowed)}; expected {", ".join(allowed)}')
        check, expected = CHECKS[key]
        if not check(value):
            raise ValueError(f'{key} must be {expected}, got {value!r}')
    if 'op_types' not in entry and 'op_names' not in entry:
        raise ValueError('expected op_types or op_names, to say which layers are meant')
    values = [key for key in (*required, *optional) if key in entry]
    if excludes(entry) and values:
        raise ValueError(f'contradicts itself: exclude is True and {values[0]} is given')
    if missing := [key for key in required if key not in entry and not excludes(entry)]:
        raise ValueError(f'expected {missing[0]}')


def matches(model, entry, types):
    """{name: layer} of one entry, in which everything that it names must occur. Raises ValueError."""
    modules = dict(model.named_modules())
    kinds = sorted({type(module).__name__ for module in modules.values()})
    if 'op_types' in entry:
        check_types(entry['op_types'], kinds, None if excludes(entry) else types)
    for name in entry.get('op_names', ()):
        if name not in modules:
            raise ValueError(f'the model has no layer {name!r}{suggestion(name, modules)}')
    wanted = set(entry.get('op_types', kinds))
    wanted |= set(DEFAULT_TYPES) if 'default' in wanted else set()
    named = {name: module for name, module in modules.items() if name in entry.get('op_names', modules)}
    found = {name: module for name, module in named.items() if type(module).__name__ in wanted}
    if 'op_names' in entry and len(found) < len(named):
        name = next(name for name in named if name not in found)
        raise ValueError(f'contradicts itself: {name} is a {type(named[name]).__name__}, which is not among its op_types')
    if not found:
        raise ValueError(f'no layer of the model has these op_types; it has {", ".join(kinds)}')
    for name in entry.get('op_names', ()) if excludes(entry) else ():
        inside = (
            [f'{name}.{child}' for child, _ in found[name].named_children()] if 'weight' not in found[name]._parameters else []
        )
        if inside:
            raise ValueError(f'{name} is a {type(found[name]).__name__} and no layer itself; name those in it, as {inside[0]}')
    return found


def check_types(op_types, kinds, types):
    """The names in op_types: of the model's types, of torch.nn's, or 'default'. Raises ValueError for any other."""
    known = {*kinds, *DEFAULT_TYPES, 'default'}
    for kind in op_types:
        if kind not in known and not hasattr(nn, kind):
            raise ValueError(f'unknown op_type {kind!r}{suggestion(kind, known)}; the model has {", ".join(kinds)}')
        if types is not None and kind not in types:
            raise ValueError(f'op_type {kind!r}: this pruner takes {" and ".join(types)} only')
