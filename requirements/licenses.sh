#!/usr/bin/env bash
# Write licenses.md: the licence of every package in the lock files, from its metadata.
# Usage: requirements/licenses.sh BIN    (BIN: the folder of the development environment's uv and pip-licenses)
set -euo pipefail
bin=$(realpath "$1")
cd "$(dirname "$0")"

pins() { sed -n 's/^\([a-z0-9.-]*==[^ ;]*\).*/\1/p' "$@" | sort -u; }
table() { PYTHONPATH=$absent "$bin/pip-licenses" --with-system --from=mixed --format=markdown --packages "${@%%==*}"; }

absent=$(mktemp -d)
trap 'rm -rf "$absent"' EXIT
# packages of extras and other systems are not in the environment; unpack them for their metadata
mapfile -t missing < <(comm -13 <("$bin/uv" pip freeze -q --python "$bin/python" | sort) \
    <(pins run.txt extras.txt dev.txt))
[ ${#missing[@]} = 0 ] ||
    "$bin/pip" install --disable-pip-version-check -q --no-deps --ignore-requires-python \
        --target "$absent" "${missing[@]}"
mapfile -t run < <(pins run.txt)
mapfile -t extras < <(comm -13 <(pins run.txt) <(pins extras.txt))
mapfile -t dev < <(comm -13 <(pins run.txt extras.txt) <(pins dev.txt))
{
    echo "# Licences of rft's dependencies"
    echo
    echo "Written by \`make licenses\` from the metadata of the releases in requirements/*.txt. rft itself is"
    echo "under [Apache-2.0](../LICENSE). What needs attention: [docs/security.md](../docs/security.md#supply-chain)."
    printf '\n## To run rft\n\n'
    table "${run[@]}"
    printf '\n## Only for the extras\n\n'
    table "${extras[@]}"
    printf '\n## Only for development\n\n'
    table "${dev[@]}"
} >licenses.md.new
mv licenses.md.new licenses.md
