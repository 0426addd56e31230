#!/bin/sh
# train.sh train|retrain|search [OPTIONS]: the trainer for MEDLOOP_MODEL, on the newest version of its data set. A Pod that
# takes the place of one which was evicted, killed or stopped goes on with the run that one began: the trainer knows it by
# MEDLOOP_LAUNCH, or by torchrun's id, which are the Job's. LAUNCHER is what starts the trainer's processes, by itself
# python. Exit statuses: docs/training.md.
set -eu

verb=$1
shift

shown=$(python -m medloop.cli dataset show "$MEDLOOP_MODEL" --json)
dataset=$(printf '%s' "$shown" | python -c 'import json, sys; print(json.load(sys.stdin)["id"])')
# shellcheck disable=SC2086 # several words
exec ${LAUNCHER:-python} -m medloop_trainer "$verb" --model "$MEDLOOP_MODEL" --dataset-id "$dataset" "$@"
