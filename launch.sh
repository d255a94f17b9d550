#!/usr/bin/env bash
# Set up the environment once, then run the rows of a table or the tests:
#   ./launch configs/quickstart [flags]     a table (a YAML file, its name without .yaml, or a folder of them)
#   ./launch configs/feather --list         its rows, their state and expected time; runs nothing
#   ./launch tests [pytest flags]           the test suite
#   ./launch verify [--data-dir DIR]        check every published weight file
#   ./launch python [arguments]             the Python that is taken, for anything else
# Takes the Python that is active (or $PYTHON) when it has what requirements.txt asks for, else makes .venv here. It may be called
# from any folder: paths in its arguments, and runs/, are those of the folder it is called from.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# OpenMP threads that spin long while they wait make a machine shared with other work crawl (25 times slower was seen); giving
# up early costs about 5 % on a quiet one.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-1000}

satisfied() { # does this Python have everything of requirements.txt?
  "$1" - "$here/requirements.txt" <<'CHECK'
import re
import sys
from importlib.metadata import PackageNotFoundError, version

def numbers(text):
    return [int(part) for part in re.findall(r'\d+', text.split('+')[0])]

missing = sys.version_info < (3, 10)
for line in open(sys.argv[1]):
    name, _, bound = line.split('#')[0].strip().partition('>=')
    try:
        missing = missing or name and numbers(version(name)) < numbers(bound)
    except PackageNotFoundError:
        missing = True
sys.exit(bool(missing))
CHECK
}

python=${PYTHON:-$(command -v python3 || command -v python || true)}
if [ -z "$python" ]; then
  echo "launch: there is no python3 on this machine; Python 3.10 or later is needed" >&2
  exit 1
fi
if ! satisfied "$python"; then
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "launch: Python 3.10 or later is needed, $python is $("$python" -V 2>&1); name another with PYTHON=..." >&2
    exit 1
  fi
  installed() { [ -x "$here/.venv/bin/python" ] && satisfied "$here/.venv/bin/python"; }
  if ! installed; then
    exec 9> "$here/.venv.lock"
    if command -v flock > /dev/null; then flock 9; fi # another launch that installs is waited for, and has then done it
    if ! installed; then
      echo "launch: installing requirements.txt into .venv (once; PyTorch is large, this takes a few minutes)"
      "$python" -m venv "$here/.venv"
      "$here/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$here/requirements.txt"
    fi
    exec 9>&-
  fi
  python=$here/.venv/bin/python
fi

if [ "${1:-}" = tests ]; then
  shift
  cd "$here"
  exec "$python" -m pytest -n auto --maxprocesses=8 "$@" # a test uses one core
fi
if [ "${1:-}" = python ]; then
  exec "$python" "${@:2}"
fi
call() { # a function of this repository, whatever files lie in the folder it is called from
  exec "$python" -c "import sys; sys.path[0] = sys.argv.pop(1); from harness.$1 import $2 as main; sys.exit(main())" "$here" "${@:3}"
}
if [ "${1:-}" = verify ]; then
  call published verify "${@:2}"
fi
call launch main "$@"
