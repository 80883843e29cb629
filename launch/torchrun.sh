#!/usr/bin/env bash
# Trains on several nodes: run this on each of them, with the same variables and arguments.
#
#     HEAD=node1:29400 NODES=2 RUN=llama3-dpo launch/torchrun.sh \
#         recipes/humanline_dpo_distributed --config configs/llama3_8b_offline.yaml data_parallel_replicate_dim=2 batch_size=2
#
# HEAD       host and free port of one of the nodes, where all nodes meet
# NODES      number of nodes
# RUN        a name for the run: a restarted node joins the run of this name, and a restarted run resumes from its last
#            checkpoint
# PROCESSES  processes per node; default: one per GPU
# RESTARTS   how often a node may restart its processes; default: 3
set -euo pipefail
exec tune run \
    --nnodes "${NODES:?the number of nodes}" --nproc_per_node "${PROCESSES:-gpu}" \
    --rdzv_backend c10d --rdzv_endpoint "${HEAD:?host:port of one of the nodes}" --rdzv_id "${RUN:?a name for the run}" \
    --max_restarts "${RESTARTS:-3}" "$@"
