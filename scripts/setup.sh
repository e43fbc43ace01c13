#!/usr/bin/env bash
# Make .venv with this project (editable) and everything that it, its checks and its pages need.
# Usage: setup.sh PYTHON. Needs that Python (3.11 or newer) and pip; versions come from constraints.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-}

if ! "${python:-false}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "setup: expected Python 3.11 or newer, found ${python:-none}. Install it, or name it: make setup PYTHON=..." >&2
  exit 2
fi

# A .venv whose interpreter is gone or another can't be mended by installing into it.
version=$("$python" -c 'import platform; print(platform.python_version())')
if [ "$(.venv/bin/python -c 'import platform; print(platform.python_version())' 2>/dev/null)" != "$version" ]; then
  echo "setup: making .venv with Python $version"
  rm -rf .venv
  # Some systems ship Python without the wheel of pip that a new environment starts with; pip can bring it.
  if ! "$python" -m venv .venv >/dev/null 2>&1; then
    "$python" -m venv --clear --without-pip .venv
    "$python" -m pip --python .venv/bin/python install --quiet --disable-pip-version-check pip
  fi
fi

echo "setup: installing sisa and what it needs into .venv (about 2 GB; a minute or two where downloads are fast)"
# Constraints by variable: so they hold for the tools that build this package too.
if ! PIP_CONSTRAINT="$PWD/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1 .venv/bin/python -m pip install \
  --progress-bar off --editable '.[digits,dev,docs]' >.venv/setup.log 2>&1; then
  tail -n 20 .venv/setup.log >&2
  echo "setup: the installation failed as shown; .venv/setup.log has every step" >&2
  exit 1
fi

built=$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("torch"))')
echo "setup: done in ${SECONDS} s; torch $built; the command is .venv/bin/sisa"
