"""Who may import whom. Every import counts: those inside functions too, and those by name with importlib."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

LAYERS = ['sparse_utils', 'archs', 'deploy', 'pruners', 'methods', 'harness', 'args', 'bench', 'main', 'hubconf']
MAY = {
    'sparse_utils': [],
    'archs': [],
    'deploy': ['sparse_utils'],
    'pruners': ['sparse_utils', 'deploy'],
    'methods': ['sparse_utils', 'deploy', 'pruners'],
    'harness': ['sparse_utils', 'archs', 'deploy', 'pruners', 'methods', 'args'],
    'args': ['sparse_utils', 'archs', 'deploy', 'pruners', 'methods', 'harness'],
    'bench': ['sparse_utils', 'archs', 'deploy', 'pruners', 'methods', 'harness', 'args'],
    'main': ['sparse_utils', 'archs', 'deploy', 'pruners', 'methods', 'harness', 'args'],
    'hubconf': ['sparse_utils', 'archs', 'deploy'],
}


def files():
    """{dotted name of a module: its path}, of all layers."""
    found = {path.stem: path for path in ROOT.glob('*.py')}
    for folder in (layer for layer in LAYERS if (ROOT / layer).is_dir()):
        for path in sorted((ROOT / folder).rglob('*.py')):
            parts = path.relative_to(ROOT).with_suffix('').parts
            found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


def imports(name, text, modules):
    """[(module that is imported, whether the import is relative)] of a module, among `modules`. Raises ValueError.

    An import by name, importlib.import_module('.x', ...), must be relative, or the reader could not tell what is loaded; only
    methods/__init__.py may load a name that is found at run time.
    """
    package = name if (ROOT / name.replace('.', '/')).is_dir() else name.rpartition('.')[0]
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(alias.name, False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package.split('.')[: len(package.split('.')) - node.level + 1] if node.level else []
            base = '.'.join([*base, *([node.module] if node.module else [])])
            for (
                alias
            ) in node.names:  # `from deploy import files` imports a module, `from deploy.files import save` a name of one
                inner = f'{base}.{alias.name}'
                found.append((inner if inner in modules else base, bool(node.level)))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(('import_module', '__import__')):
            target = node.args[0]
            if isinstance(target, ast.Constant):
                relative = target.value.startswith('.')
                found.append((f'{package}{target.value}' if relative else target.value, relative))
            elif name != 'methods':
                raise ValueError(f'{name} imports {ast.unparse(target)}, a name that is known at run time only')
    return [(target, relative) for target, relative in found if target.split('.')[0] in LAYERS and target != name]


def faults(modules):
    """What the rule forbids among {name: text}: sentences."""
    found = []
    for name, text in modules.items():
        layer = name.split('.')[0]
        for target, relative in imports(name, text, modules):
            other = target.split('.')[0]
            if other == layer and not relative:
                found.append(f'{name} imports {target} of its own folder: write it relative')
            if other != layer and other not in MAY[layer]:
                found.append(f'{name} imports {target}: {layer} may import {", ".join(MAY[layer]) or "none of these"}')
    return found


def circle(modules):
    """Modules that import one another in a circle, or None. A folder's __init__ counts for who imports names of it."""
    graph = {
        name: {target for target, _ in imports(name, text, modules) if target in modules} for name, text in modules.items()
    }
    done = set()

    def walk(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for target in sorted(graph[name]):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return None

    return next((found for name in graph if (found := walk(name, []))), None)


@pytest.fixture(scope='module')
def modules():
    return {name: path.read_text() for name, path in files().items() if name.split('.')[0] in LAYERS}


def test_layers(modules):
    assert {name.split('.')[0] for name in modules} == set(LAYERS)
    assert faults(modules) == []


def test_no_circle(modules):
    assert circle(modules) is None


def test_every_module_at_the_root_has_a_layer():
    assert {path.stem for path in ROOT.glob('*.py')} <= {*LAYERS, 'hubconf'}


def test_third_parties_of_the_library():
    """What people copy or import needs torch and few others; sparse_utils needs torch and the standard library."""
    allowed = {
        'sparse_utils': {'torch', 'collections', 'contextlib', 'fnmatch', 'inspect', 'math', 'warnings'},
        'deploy': None,
        'pruners': None,
        'methods': None,
    }
    heavy = {'yaml', 'tensorboard', 'sklearn', 'matplotlib', 'torchvision', 'numpy', 'scipy'}
    for name, path in files().items():
        layer = name.split('.')[0]
        if layer in allowed:
            tree = ast.parse(path.read_text())
            names = {
                alias.name.split('.')[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
            }
            names |= {
                node.module.split('.')[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level
            }
            assert not names & heavy, name
            assert allowed[layer] is None or names <= allowed[layer], name


@pytest.mark.parametrize(
    'name, line',
    [
        ('methods.x', 'import args'),
        ('methods.x', 'def f():\n    from harness.data import load'),
        ('methods.x', 'from main import Job'),
        ('pruners.x', 'import importlib\nimportlib.import_module("methods.level")'),
        ('pruners.x', 'import methods.level as level'),
        ('deploy.x', 'from pruners import processes'),
        ('deploy.x', 'from deploy.files import save'),
        ('archs.x', 'import sparse_utils'),
        ('sparse_utils', 'from deploy import shrink'),
        ('harness.x', 'import main'),
    ],
)
def test_the_rule_finds(name, line, modules):
    assert faults({**modules, name: line})


def test_circles_are_found(modules):
    assert circle({'harness.a': 'from . import b', 'harness.b': 'def f():\n    from .a import x'})
    assert circle({'harness.a': 'from . import b', 'harness.b': ''}) is None
    with pytest.raises(ValueError, match='at run time'):
        imports('pruners.x', 'import importlib\nimportlib.import_module(name)', modules)


LATE = """
import sys
import archs
archs.build('resnet20', 10)
assert 'torchvision' not in sys.modules, 'archs'
import harness.data
assert not {'torchvision', 'sklearn'} & set(sys.modules), 'data'
sys.modules['torchvision'] = None
import main
main.parse(['--dataset=digits'])
"""


def test_what_is_imported_only_when_it_is_needed():
    """archs and data import torchvision and scikit-learn when asked for what needs them; main.py runs without."""
    done = subprocess.run([sys.executable, '-c', LATE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
