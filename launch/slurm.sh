#!/usr/bin/env bash
# Trains on several nodes under Slurm. Submit it from the clone, in humanline's environment:
#
#     sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sh \
#         recipes/humanline_dpo_distributed --config configs/llama3_8b_offline.yaml data_parallel_replicate_dim=2 batch_size=2
#
# Five minutes before the time limit the run is told to write a checkpoint. A job that Slurm requeues keeps its id, and
# resumes from the last checkpoint. A new job resumes too, if RUN is the id of the first job.
#SBATCH --job-name humanline
#SBATCH --ntasks-per-node 1
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --signal TERM@300
set -euo pipefail
NODES=$SLURM_JOB_NUM_NODES
RUN=${RUN:-$SLURM_JOB_ID}
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):$((20000 + SLURM_JOB_ID % 10000))
TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}  # seconds; torchrun kills slower processes
export NODES RUN HEAD TORCH_ELASTIC_SHUTDOWN_TIMEOUT
srun --kill-on-bad-exit=0 bash launch/torchrun.sh "$@"
