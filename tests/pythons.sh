#!/usr/bin/env bash
# Run `make quick` with the packages of requirements/LOCK.txt on each named Python that is found on PATH
# or in pyenv. Each has its own environment, build/LOCKX.Y, of some gigabytes.
# Usage: tests/pythons.sh LOCK VERSION...    PYTHONS="3.12 3.13" selects other versions.
set -euo pipefail
lock=$1
shift
cd "$(dirname "$0")/.."

interpreter() {
    local found
    for found in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        # run it, because pyenv puts names on PATH that lead nowhere
        if "$found" -c "import sys; sys.exit(sys.version_info[:2] != (${1/./, }))" 2>/dev/null; then
            command -v "$found"
            return
        fi
    done
    return 1
}

tested=()
for version in ${PYTHONS:-$*}; do
    if found=$(interpreter "$version"); then
        echo "Python $version: $found"
        make --no-print-directory quick PYTHON="$found" LOCK="$lock" VENV="build/$lock$version"
        tested+=("$version")
    else
        echo "Python $version: not found"
    fi
done
echo "tested: ${tested[*]:-none}"
[ ${#tested[@]} -gt 0 ]
