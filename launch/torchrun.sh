#!/usr/bin/env bash
# Train on all GPUs of a machine; started on each of several machines, on all of them as one. See docs/launch.md.
#
#   launch/torchrun.sh RECIPE [KEY=VALUE ...] --run FOLDER
#   PET_NNODES=2 PET_RDZV_ENDPOINT=HOST:29500 PET_RDZV_ID=NAME launch/torchrun.sh RECIPE ... --run FOLDER
#
# torchrun reads its options from PET_*, so whatever is set outside goes before what stands here. Leaves with 0 when the
# run is complete, 75 when it was asked to stop (start it again: it goes on), 1 otherwise.
set -u

export PET_NPROC_PER_NODE="${PET_NPROC_PER_NODE:-gpu}" # ranks on this machine: one for each GPU, or a number
export PET_MAX_RESTARTS="${PET_MAX_RESTARTS:-3}"
if [ -n "${PET_RDZV_ENDPOINT:-}" ]; then
    export PET_RDZV_BACKEND="${PET_RDZV_BACKEND:-c10d}"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Without this a restarted rank may find the addresses of the ranks before it, and wait for the dead.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# How long the ranks may take to write a checkpoint once they are asked to stop.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}"
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGUSR1}" # for the case that it gets them directly

# `--`, or torchrun takes --run for an option of its own. A closed terminal (HUP) is for this script to answer.
(trap '' HUP && exec torchrun -m -- openelm pretrain "$@" --auto-resume) &
torchrun=$!

# torchrun knows one way to stop: it passes the signal on, waits for the ranks, and leaves with 1.
asked=
trap 'asked=yes; kill -TERM "$torchrun" 2>/dev/null' TERM USR1 HUP
trap 'asked=yes' INT # the terminal has sent it to torchrun too
while :; do # a signal ends `wait`, not torchrun
    wait "$torchrun"
    code=$?
    kill -0 "$torchrun" 2>/dev/null || break
done
if [ -n "$asked" ] && [ "$code" -ne 0 ]; then
    code=75
fi
exit "$code"
