#!/usr/bin/env bash
# A run on nodes that Slurm hands out: sbatch deploy/slurm.sh RECIPE [OPTIONS]
#
# One Ray node a Slurm node; the store must lie where all of them see it. When the time is up or a
# node is taken away, submit the same line again: it goes on where it stopped.
#SBATCH --job-name=offline-dpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Two minutes before the end: the run stops in good order, and the job is queued once more.
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

recipe=${1:?usage: sbatch deploy/slurm.sh RECIPE [OPTIONS]}
shift
cd "${SLURM_SUBMIT_DIR:?is set by sbatch}"
# shellcheck disable=SC1091
source .venv/bin/activate

head_node=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | head -n 1)
# Two jobs on one node, where that is allowed, want two ports.
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$head_node:$port"
# Whoever reaches Ray's ports can run code, unless they want a token.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

options=(--disable-usage-stats --block)
srun --nodes=1 --ntasks=1 --nodelist="$head_node" --export=ALL \
    ray start --head --node-ip-address="$head_node" --port="$port" \
    --include-dashboard=false "${options[@]}" &
for _ in {1..60}; do
    ray health-check --address "$RAY_ADDRESS" 2>/dev/null && break
    sleep 2
done
if ((SLURM_JOB_NUM_NODES > 1)); then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks=$((SLURM_JOB_NUM_NODES - 1)) \
        --exclude="$head_node" --export=ALL \
        ray start --address="$RAY_ADDRESS" "${options[@]}" &
fi

# This script runs on the first node, so that the driver is beside Ray's head. Nodes that come later
# are used as they come.
python run.py run "$recipe" "$@" &
driver=$!
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
# A trapped signal ends `wait` before the driver has ended.
while kill -0 "$driver" 2>/dev/null; do
    code=0
    wait "$driver" || code=$?
done
trap - TERM
jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true
# 143: it was told to stop, and what it has committed stays.
if ((code == 143)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
