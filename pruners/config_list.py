"""Config lists: which layers of a model a pruner takes, and with which settings. NNI's form, checked to the last key."""

import difflib
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from sparse_utils import matrices, place_name

from .own_weight import why_not_own

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

    A layer matches an entry when its type is in `op_types` and its dotted name in `op_names`, as far as the entry has them; it
    needs one of the two. A type stands for its subclasses too; 'default' is DEFAULT_TYPES. A name may be a pattern, as
    'layer1.*.conv2'; one without op_types means layers of DEFAULT_TYPES, or of the types that the pruner takes. The last
    matching entry decides; where that has `exclude: True` the layer is left out.
    required, optional: the keys of an entry beside these three. types: the types of layers that the pruner takes, None for any
    with a weight. Raises ValueError, naming the entry and what was expected, also for a layer that cannot be pruned, as it
    computes its weight from others.
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
    layers = {}
    entries = {}
    for name, _ in model.named_modules():
        if name in chosen and not excludes(chosen[name][1]):
            layer, entry, number = chosen[name]
            check_layer(name, layer, types, f'config_list[{number}] = {entry}')
            layers[name] = layer
            entries[name] = entry
    if not layers:
        raise ValueError('config_list excludes every layer that it names: nothing is left to prune')
    return layers, entries


def check_layer(name: str, layer: nn.Module, types: tuple[str, ...] | None, place: str) -> None:
    """Raises ValueError for a layer that cannot be pruned."""
    kind = type(layer).__name__
    if types is not None and not is_of_type(layer, types):
        raise ValueError(f'{place}: {name} is a {kind}; this pruner takes {listed(types)} only')
    if reason := why_not_own(layer):
        raise ValueError(f'{place}: {name}, a {kind}, {reason}')


def warn_of_others(pruner: str, model: nn.Module, config_list: list[dict]) -> None:
    """Name the matrices that a pruner of weights leaves dense where op_types 'default' sounds like all of them."""
    if not any('default' in entry.get('op_types', ()) for entry in config_list):
        return
    kinds = {}
    for name, module, attribute in matrices(model):
        if attribute != 'weight' or not is_of_type(module, DEFAULT_TYPES):
            kinds.setdefault(f'{type(module).__name__}.{attribute}', []).append(place_name(name, attribute))
    if kinds:
        parts = [f'{len(names)} x {kind} (as {names[0]})' for kind, names in kinds.items()]
        warnings.warn(
            f"{pruner}: 'default' means layers of PyTorch's with a `weight`, so these stay dense: {', '.join(parts)}. "
            'Layers with a `weight` can be named in op_types or op_names; sparse_utils.Pruner(include=...) prunes any matrix',
            stacklevel=4,
        )


def type_names(module: nn.Module) -> list[str]:
    """The name of a module's class and those of its base classes, below nn.Module."""
    return [kind.__name__ for kind in type(module).__mro__ if issubclass(kind, nn.Module) and kind is not nn.Module]


def is_of_type(module: nn.Module, types: Iterable[str]) -> bool:
    """Whether a module's class, or a base class of it, has one of these names."""
    return not set(types).isdisjoint(type_names(module))


def is_pattern(name: str) -> bool:
    return any(character in name for character in '*?[')


def listed(names: Iterable[str]) -> str:
    """'a, b and c'"""
    *others, last = names
    return f'{", ".join(others)} and {last}' if others else last


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


def matches(model: nn.Module, entry: dict, types: tuple[str, ...] | None) -> dict[str, nn.Module]:
    """{name: layer} of one entry, in which everything that it names must occur. Raises ValueError."""
    modules = dict(model.named_modules())
    kinds = sorted({type(module).__name__ for module in modules.values()})
    wanted = set(entry.get('op_types', ()))
    if wanted:
        check_types(wanted, modules.values(), None if excludes(entry) else types)
    if 'default' in wanted:
        wanted |= set(DEFAULT_TYPES)
    if 'op_names' not in entry:
        layers = {name: module for name, module in modules.items() if is_of_type(module, wanted)}
    else:
        layers = {}
        for name in entry['op_names']:
            if is_pattern(name):
                layers |= match_pattern(name, modules, wanted or set(types or DEFAULT_TYPES))
            else:
                layers[name] = match_name(name, modules, wanted, excludes(entry))
    if not layers:
        raise ValueError(f'no layer of the model has these op_types; it has {", ".join(kinds)}')
    return layers


def match_pattern(pattern: str, modules: dict[str, nn.Module], types: set[str]) -> dict[str, nn.Module]:
    """The layers of these types whose names match. Raises ValueError where there is none."""
    found = {}
    for name, module in modules.items():
        if fnmatchcase(name, pattern) and is_of_type(module, types):
            found[name] = module
    if not found:
        raise ValueError(f'{pattern!r} matches no layer of type {" or ".join(sorted(types))}{suggestion(pattern, modules)}')
    return found


def match_name(name: str, modules: dict[str, nn.Module], types: set[str], excluded: bool) -> nn.Module:
    """The module of this name. Raises ValueError where there is none, or where it is of another type or no layer itself."""
    if name not in modules:
        raise ValueError(f'the model has no layer {name!r}{suggestion(name, modules)}')
    module = modules[name]
    kind = type(module).__name__
    if types and not is_of_type(module, types):
        raise ValueError(f'contradicts itself: {name} is a {kind}, which is not among its op_types')
    children = [child for child, _ in module.named_children()]
    is_layer = bool(module._parameters) or parametrize.is_parametrized(module)
    if excluded and children and not is_layer:
        raise ValueError(f"{name} is a {kind} and no layer itself; name those in it, as {name}.{children[0]}, or '{name}.*'")
    return module


def check_types(op_types: Iterable[str], modules: Iterable[nn.Module], types: tuple[str, ...] | None) -> None:
    """The names in op_types: of the model's types, of torch.nn's, or 'default'. Raises ValueError for any other."""
    modules = list(modules)
    known = {'default', *DEFAULT_TYPES}
    taken = set(types or ())  # and what is derived from them
    for module in modules:
        known |= set(type_names(module))
        if types is not None and is_of_type(module, types):
            taken.add(type(module).__name__)
    for kind in sorted(op_types):
        if kind not in known and not hasattr(nn, kind):
            own = sorted({type(module).__name__ for module in modules})
            raise ValueError(f'unknown op_type {kind!r}{suggestion(kind, known)}; the model has {", ".join(own)}')
        if types is not None and kind not in taken:
            raise ValueError(f'op_type {kind!r}: this pruner takes {listed(types)} only')
