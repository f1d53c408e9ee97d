#!/usr/bin/env bash
# A run on nodes allocated by Slurm: sbatch deploy/slurm.sh RECIPE [OPTIONS]
#
# Starts one Ray node on each Slurm node; all of them must see the store. After a time-out or a lost
# node, submit the same command again: the run continues where it stopped.
#SBATCH --job-name=offline-dpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
# Two minutes before the time limit, stop the run cleanly and requeue the job.
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
# Two jobs may share a node, so each gets a port of its own.
port=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS="$head_node:$port"
# Without a token, anyone who can reach Ray's ports can run code.
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

# This script runs on the first node, so the driver shares it with Ray's head. Nodes that join later
# are used when they join.
python run.py run "$recipe" "$@" &
driver=$!
trap 'kill -TERM "$driver"' TERM
code=0
wait "$driver" || code=$?
# A trapped signal ends `wait` before the driver exits.
while kill -0 "$driver" 2>/dev/null; do
    code=0
    wait "$driver" || code=$?
done
trap - TERM
jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true
# Exit code 143: the driver was terminated; committed work is kept.
if ((code == 143)); then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
