#!/usr/bin/env bash
# All experiments of the paper from one command.
set -euo pipefail

usage() {
    cat <<'END'
usage: launch/reproduce.sh --miniature [--seeds N] [--epochs N] [--out DIR] [--processes N]

Runs every row of the paper's Tables 1 and 3 and every model of its Fig. 7 on the miniature world,
on this machine, and prints the table beside the paper's. The same command again goes on where it
was stopped.

  --seeds N      fine-tuning seeds, 1 if not given; the paper has 3
  --epochs N     fewer epochs than the recipes have, to try the path
  --out DIR      folder for images, shards, runs and report, miniature if not given
  --processes N  ranks of a training, 2 if not given
END
}

miniature=no
options=(paper)
for argument in "$@"; do
    case $argument in
        --miniature) miniature=yes ;;
        -h | --help)
            usage
            exit 0
            ;;
        *) options+=("$argument") ;;
    esac
done

if [ $miniature = no ]; then
    echo "error: without --miniature, submit to your cluster by hand: python -m rft.experiments" \
        "lists the commands, launch/train.sbatch runs a training" >&2
    exit 2
fi

# .venv is what make builds; an activated environment does as well
python=$(dirname "${BASH_SOURCE[0]}")/../.venv/bin/python
[ -x "$python" ] || python=python
exec "$python" -m rft.demo "${options[@]}"
