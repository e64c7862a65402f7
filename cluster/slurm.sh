#!/bin/bash
# `sbatch cluster/slurm.sh run.yaml`: one run on Ray nodes of this allocation, one per machine. Slurm
# warns two minutes before the end: the run stores itself, and the job is queued again to go on.
#SBATCH --job-name=esper
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-task=1
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
run_file=${1:?usage: sbatch cluster/slurm.sh RUN_FILE}

export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH="$PWD/.ray-token-$SLURM_JOB_ID" # a folder that all machines share
export RAY_USAGE_STATS_ENABLED=0
(umask 077 && head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")
trap 'rm -f "$RAY_AUTH_TOKEN_PATH"' EXIT

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
port=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a machine do not meet
head_ip=$(srun --nodes=1 --ntasks=1 -w "${hosts[0]}" hostname --ip-address | awk '{print $1}')
address=$head_ip:$port

srun --nodes=1 --ntasks=1 --overlap -w "${hosts[0]}" \
  ray start --head --block --node-ip-address="$head_ip" --port="$port" \
  --num-cpus="$SLURM_CPUS_PER_TASK" --include-dashboard=false &
# Workers try again until the head answers, for a minute.
if ((${#hosts[@]} > 1)); then
  srun --nodes=$((${#hosts[@]} - 1)) --ntasks=$((${#hosts[@]} - 1)) --overlap -x "${hosts[0]}" \
    ray start --block --address="$address" --num-cpus="$SLURM_CPUS_PER_TASK" &
fi

for _ in {1..60}; do
  ray status --address "$address" >/dev/null 2>&1 && break
  sleep 2
done

esper-ray train "$run_file" --resume auto --set cluster.address="$address" &
run=$!
again=
trap 'again=yes; kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
if [[ -n $again ]]; then
  code=0
  wait "$run" || code=$? # the first wait ended with the signal
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
