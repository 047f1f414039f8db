#!/bin/bash
# The zoo on the nodes of a SLURM job, a process for each GPU:
#   sbatch slurm.sh predict molecules.xyz runs/RUN --output table.parquet --device cuda
#   sbatch slurm.sh fit --config qm9_schnet_abp --output runs/qm9 --data.path qm9
#SBATCH --job-name=zoo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
# SIGTERM to every process 2 minutes before the end; fit then stops after a whole epoch's checkpoint.
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

# Not by "head -n 1", which ends scontrol by a signal, and the script with it.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
processes=${SLURM_GPUS_ON_NODE:-${SLURM_CPUS_PER_TASK:-1}}

# Of a job that was requeued: the run goes on, if it had come to a checkpoint.
output=$(printf '%s\n' "$@" | grep -A1 -x -- --output | tail -n 1 || true)
if [ "${1:-}" = fit ] && [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] &&
  { [ -f "$output/last.ckpt" ] || [ -f "$output/best.ckpt" ]; }; then
  set -- "$@" --ckpt_path last
fi

srun torchrun --nnodes "$SLURM_NNODES" --nproc_per_node "$processes" \
  --rdzv_backend c10d --rdzv_endpoint "$head:29500" --rdzv_id "$SLURM_JOB_ID" \
  -m attnpool_kernels.zoo "$@"
