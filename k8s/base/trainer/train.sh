#!/bin/sh
# train.sh train|retrain|search [OPTIONS]: the trainer for MEDLOOP_MODEL, on the newest version of its data set. A Pod that
# takes the place of one which was evicted, killed or stopped (EARLIER_PODS) goes on with the run that one began. LAUNCHER
# is what starts the trainer's processes, by itself python. Exit statuses: docs/training.md.
set -eu

NOTHING_TO_RESUME=6
verb=$1
shift

if [ "${EARLIER_PODS:-0}" -gt 0 ]; then
    status=0
    python -m medloop_trainer "$verb" --model "$MEDLOOP_MODEL" --resume latest &
    trainer=$!
    # A shell that is process 1 hands no signal on, and its wait ends with the signal, not with the trainer.
    trap 'kill -TERM "$trainer"' TERM
    wait "$trainer" || status=$?
    while kill -0 "$trainer" 2>/dev/null; do
        status=0
        wait "$trainer" || status=$?
    done
    [ "$status" -eq "$NOTHING_TO_RESUME" ] || exit "$status"
    trap - TERM
fi

shown=$(python -m medloop.cli dataset show "$MEDLOOP_MODEL" --json)
dataset=$(printf '%s' "$shown" | python -c 'import json, sys; print(json.load(sys.stdin)["id"])')
# shellcheck disable=SC2086 # several words
exec ${LAUNCHER:-python} -m medloop_trainer "$verb" --model "$MEDLOOP_MODEL" --dataset-id "$dataset" "$@"
