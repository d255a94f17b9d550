"""Networks that are not of archs/: torchvision's, timm's, and those of anybody's file.

    torchvision/NAME      torchvision.models.get_model(NAME), classification networks
    timm/NAME             timm.create_model(NAME)
    FILE.py:FUNCTION      what a function (or class) of that file returns, an nn.Module

torchvision and timm are imported here alone, when asked for. A file is loaded with its folder importable, and with modules of
its own even where they are called as ours (args.py, data.py, methods/); an import that its functions make later, in forward,
finds what is importable then. If the file lies in a package, so that it may import `from . import x`, it is loaded as a part of
that package.
"""

import ast
import contextlib
import difflib
import importlib.util
import inspect
import sys
import sysconfig
from pathlib import Path

import torch
from torch import nn

OURS = Path(__file__).resolve().parents[1]
FILES = {}  # {FILE.py as it was named: {path in the folder that is importable: Path}}, of the files that were loaded


def is_elsewhere(name):
    """Whether a name of --model means a network of this module."""
    return name.startswith(('torchvision/', 'timm/')) or is_file(name)


def is_file(name):
    return name.endswith('.py') or '.py:' in name


def absolute(name):
    """The name with FILE.py as an absolute path; other names are left as they are."""
    if not is_file(name):
        return name
    path, colon, function = name.partition('.py:')
    path = Path(f'{path}.py' if colon else name).expanduser().resolve()
    return f'{path}{":" if colon else ""}{function}'


def build_elsewhere(name, num_classes, in_channels, image_size, pretrained=False, sources=None):
    """The network of a name that is_elsewhere(), with fresh weights. Raises ValueError or RuntimeError with one sentence.

    pretrained: torchvision's googlenet and inception_v3 with published weights change the range of images in their forward.
    sources: a folder with copies of the files of FILE.py:FUNCTION, which are then used instead of FILE.py.
    """
    if name.startswith('torchvision/'):
        net = torchvision_network(name.partition('/')[2], num_classes, in_channels, image_size, pretrained)
    elif name.startswith('timm/'):
        net = timm_network(name.partition('/')[2], num_classes, in_channels, image_size)
    else:
        net = network_of_file(name, num_classes, in_channels, image_size, sources)
    check_outputs(net, name, num_classes, in_channels, image_size)
    return net


def check_outputs(net, name, num_classes, in_channels, image_size):
    """Raises ValueError where the network does not turn two images into two rows of logits."""
    size = f'{in_channels}x{image_size}x{image_size}'
    modes = [(module, module.training) for module in net.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = net.eval()(torch.zeros(2, in_channels, image_size, image_size))
    except Exception as error:  # whatever its forward raises
        raise ValueError(f'{name} does not take images of {size}: {one_line(error)}') from None
    finally:
        for module, training in modes:
            module.training = training
    if not torch.is_tensor(logits) or logits.shape != (2, num_classes):
        found = f'outputs of shape {tuple(logits.shape)}' if torch.is_tensor(logits) else f'a {type(logits).__name__}'
        raise ValueError(f'{name} gives {found} for 2 images, where logits of shape (2, {num_classes}) are due')


def one_line(error):
    return f'{type(error).__name__}: {" ".join(f"{error}".split())[:200]}'


def unknown(name, names, library):
    """The ValueError for a name that a library does not have."""
    near = difflib.get_close_matches(name, names, 4, cutoff=0.5)
    hint = f'; did you mean {", ".join(f"{library}/{other}" for other in near)}?' if near else ''
    return ValueError(f'{library} has no network {name!r} among its {len(names)} for classification{hint}')


# ------------------------------------------------------------------------------------------------------- torchvision, timm


def torchvision_models(what):
    """torchvision.models. One that does not match the installed torch fails with a RuntimeError, not an ImportError."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(f'{what} needs torchvision, which cannot be imported here: {error}') from error
    return models


def timm_library(what):
    try:
        import timm
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(f'{what} needs timm, which cannot be imported here ({error}): pip install timm') from error
    return timm


def torchvision_options(models, name, image_size, pretrained):
    """What a network of torchvision is built with, beside its number of classes: without auxiliary outputs."""
    names = models.list_models(module=models)
    if name not in names:
        raise unknown(name, names, 'torchvision')
    if name in ('googlenet', 'inception_v3'):
        return {'aux_logits': False, 'transform_input': pretrained} | ({} if pretrained else {'init_weights': True})
    return {'image_size': image_size} if name.startswith('vit_') else {}


def torchvision_network(name, num_classes, in_channels, image_size, pretrained=False):
    """A network of torchvision with fresh weights; for another number of channels than 3 its first convolution is another."""
    models = torchvision_models(f'torchvision/{name}')
    options = torchvision_options(models, name, image_size, pretrained)
    if pretrained and 'aux_logits' in options:
        options['init_weights'] = True
    try:
        net = models.get_model(name, num_classes=num_classes, **options)
    except (ValueError, RuntimeError, TypeError) as error:
        raise ValueError(
            f'torchvision/{name} cannot be built for images of {image_size}x{image_size}: {one_line(error)}'
        ) from None
    if in_channels != 3:
        change_stem(net, in_channels)
    return net


def change_stem(net, in_channels):
    """Another first convolution, drawn as torchvision draws those of ResNets."""
    name, old = next((name, module) for name, module in net.named_modules() if isinstance(module, nn.Conv2d))
    new = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None)
    nn.init.kaiming_normal_(new.weight, mode='fan_out', nonlinearity='relu')
    net.set_submodule(name, new)


def timm_options(timm, name, in_channels, image_size):
    names = timm.list_models()
    if name.partition('.')[0] not in names:
        raise unknown(name, names, 'timm')
    facts = timm.models.get_pretrained_cfg(name)
    options = {'in_chans': in_channels}
    return options | ({'img_size': image_size} if getattr(facts, 'fixed_input_size', False) else {})


def timm_network(name, num_classes, in_channels, image_size):
    """A network of timm with fresh weights; one that takes a single image size is built for ours."""
    timm = timm_library(f'timm/{name}')
    options = timm_options(timm, name, in_channels, image_size)
    try:
        return timm.create_model(name, num_classes=num_classes, **options)
    except Exception as error:  # of the code of a thousand networks
        raise ValueError(f'timm/{name} cannot be built for images of {image_size}x{image_size}: {one_line(error)}') from None


def pretrained_state(name, in_channels, image_size):
    """(published weights, a state dict; their name; mean and std of the images they were trained on), of torchvision or timm.

    The weights have the library's own number of classes. They are downloaded to the library's own folder where they are not
    there yet. Raises ValueError where there are none, RuntimeError where they cannot be had.
    """
    library, _, own = name.partition('/')
    if library == 'torchvision':
        return torchvision_state(own, in_channels, image_size)
    if library == 'timm':
        return timm_state(own, in_channels, image_size)
    raise ValueError(
        f'there are no published weights of {name}: --pretrained is for torchvision/NAME and timm/NAME; '
        'weights of your own come in with --from FILE'
    )


def torchvision_state(name, in_channels, image_size):
    models = torchvision_models(f'torchvision/{name}')
    options = torchvision_options(models, name, image_size, pretrained=True)
    if in_channels != 3:
        raise ValueError(f'the weights of torchvision/{name} are for images of 3 channels, not {in_channels}')
    if not list(models.get_model_weights(name)):
        raise ValueError(f'torchvision has no weights of {name}: weights of your own come in with --from FILE')
    weights = models.get_model_weights(name).DEFAULT
    folder = Path(torch.hub.get_dir()) / 'checkpoints'
    if name.startswith('vit_') and image_size != weights.meta['min_size'][0]:
        wanted = weights.meta['min_size'][0]
        raise ValueError(f'the weights of torchvision/{name} are for images of {wanted}x{wanted}: give --image-size {wanted}')
    try:
        net = models.get_model(name, weights=weights, progress=False, **options)
    except Exception as error:  # the network, the file, the disk: the ways on are the same
        file = folder / Path(weights.url).name
        raise cannot_be_had(name, f'{weights.url} and {file}', error, 'that file, put it there, or') from None
    shown = weights.transforms()
    return net.state_dict(), weights.name, shown.mean, shown.std


def timm_state(name, in_channels, image_size):
    timm = timm_library(f'timm/{name}')
    options = timm_options(timm, name, in_channels, image_size)
    facts = timm.models.get_pretrained_cfg(name)
    place = facts and (facts.hf_hub_id or facts.url)
    if not place:
        raise ValueError(f'timm has no weights of {name}: weights of your own come in with --from FILE')
    try:
        net = timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        raise cannot_be_had(name, f'{place} (as timm names it) and its cache', error, 'its model.safetensors,') from None
    return net.state_dict(), f'{facts.architecture}.{facts.tag}', facts.mean, facts.std


def cannot_be_had(name, places, error, file):
    """The RuntimeError for weights that cannot be downloaded."""
    return RuntimeError(
        f'the weights of {name} could not be had; looked in {places} ({one_line(error)}): '
        f'where you have {file} give it with --from FILE instead of --pretrained'
    )


# -------------------------------------------------------------------------------------------------------- FILE.py:FUNCTION


def network_of_file(name, num_classes, in_channels, image_size, sources=None):
    """What the function of `FILE.py:FUNCTION` returns.

    It is called with those of num_classes, in_channels and image_size that it takes. sources: see build_elsewhere().
    """
    path, _, function = name.rpartition(':')
    if not path.endswith('.py'):
        path = name
        function = ''
    path = Path(path).expanduser().resolve()
    file = path if sources is None else copy_of(path, sources)
    if not file.is_file():
        raise ValueError(f'--model {name}: there is no file {file}')
    names = names_in(file)
    if function not in names:
        near = difflib.get_close_matches(function, names, 3)
        hint = f'did you mean {", ".join(near)}?' if near else f'it has {", ".join(names) or "none"}'
        asked = f'has no function {function!r}' if function else 'needs the name of a function behind it, FILE.py:FUNCTION'
        raise ValueError(f'{file} {asked}; {hint}')
    with folder_importable(file) as (top, module_name):
        try:
            module = load(file, module_name)
            make = getattr(module, function)
            settings = {'num_classes': num_classes, 'in_channels': in_channels, 'image_size': image_size}
            net = make(**{key: value for key, value in settings.items() if takes(make, key)})
        except Exception as error:  # of somebody's own code
            raise ValueError(f'{file}:{function} cannot be used: {one_line(error)}') from None
        FILES[str(path)] = {path.relative_to(top).as_posix(): path for path in loaded_below(top, file)}
    if not isinstance(net, nn.Module):
        raise ValueError(f'{file}:{function} returns a {type(net).__name__}, where an nn.Module is due')
    return net


def files_of(name):
    """{path in a folder: Path} of the files that a network built from FILE.py:FUNCTION came from; {} for other networks."""
    return FILES.get(name.rpartition(':')[0], {}) if is_file(name) else {}


def copy_of(path, sources):
    """Where a file lies in a folder of copies: under as much of its path as there is."""
    parts = Path(path).parts
    found = [sources / Path(*parts[start:]) for start in range(1, len(parts))]
    return next((file for file in found if file.is_file()), sources / path.name)


def names_in(file):
    """The functions and classes of a file, and what it assigns or imports by name, without running it."""
    try:
        body = ast.parse(file.read_text()).body
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f'{file} is no Python file that can be read: {one_line(error)}') from None
    names = [node.name for node in body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    for node in body:
        if isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names += [alias.asname or alias.name for alias in node.names]
    return names


def takes(function, name):
    """Whether a function has a parameter of this name, or takes any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # of something built in
        return False
    any_name = name == 'num_classes' and any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters)
    return any_name or any(parameter.name == name for parameter in parameters)


@contextlib.contextmanager
def folder_importable(file):
    """(folder, name of the module) while the folder of a file is importable, and its package's if it lies in one.

    Modules that were loaded before under a name which the folder has too are out of the way meanwhile, but for installed ones.
    """
    top = file.parent
    parts = [file.stem]
    while (top / '__init__.py').is_file():
        parts.insert(0, top.name)
        top = top.parent
    folders = [str(top)] if top == file.parent else [str(top), str(file.parent)]
    own = {path.stem for folder in folders for path in Path(folder).iterdir() if path.suffix == '.py' or path.is_dir()}
    hidden = {}
    for name, module in list(sys.modules.items()):
        if name.partition('.')[0] in own and not may_stay(module, top):
            hidden[name] = sys.modules.pop(name)
    path_before = list(sys.path)
    written = sys.dont_write_bytecode
    sys.dont_write_bytecode = True  # nothing is left in a folder of somebody's
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        yield top, '.'.join(parts)
    finally:
        sys.path[:] = path_before
        sys.dont_write_bytecode = written
        sys.modules.update(hidden)


def may_stay(module, top):
    """Whether a loaded module is an installed one, or one of ours that is imported from our own folder."""
    place = getattr(module, '__file__', None) or next(iter(getattr(module, '__path__', [])), None)
    if place is None:
        return True
    place = Path(place).resolve()
    paths = sysconfig.get_paths()
    installed = [Path(paths[key]).resolve() for key in ('stdlib', 'platstdlib', 'purelib', 'platlib')]
    return any(place.is_relative_to(folder) for folder in installed) or (top == OURS and place.is_relative_to(OURS))


def load(file, name):
    """Run a file as the module of this name; the packages around it first."""
    spec = importlib.util.find_spec(name) if '.' in name else importlib.util.spec_from_file_location(name, file)
    if name in sys.modules:  # its package has imported it
        return sys.modules[name]
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def loaded_below(top, file):
    """The file, and the files of the modules loaded from the importable folder, but for ours and installed ones."""
    found = {file}
    for module in list(sys.modules.values()):
        place = getattr(module, '__file__', None)
        if place and Path(place).suffix == '.py' and Path(place).resolve().is_relative_to(top) and not may_stay(module, top):
            found.add(Path(place).resolve())
    return sorted(found)
