#!/usr/bin/env bash
# Trains on several nodes: run this on each of them, with the same variables and arguments.
#
#     HEAD=node1:29400 NODES=2 RUN=llama3-dpo launch/torchrun.sh \
#         recipes/humanline_dpo_distributed --config configs/llama3_8b_offline.yaml data_parallel_replicate_dim=2 batch_size=2
#
# HEAD       host and free port of one of the nodes, where they all meet
# NODES      how many there are
# RUN        a name for the run: a node that is started again under it joins the run that is there, and a run that is
#            started again under it goes on from its last checkpoint
# PROCESSES  processes a node; one a GPU unless given
# RESTARTS   how often a node may start its processes anew; 3 unless given
set -euo pipefail
exec tune run \
    --nnodes "${NODES:?how many nodes there are}" --nproc_per_node "${PROCESSES:-gpu}" \
    --rdzv_backend c10d --rdzv_endpoint "${HEAD:?host:port of one of the nodes}" --rdzv_id "${RUN:?a name for the run}" \
    --max_restarts "${RESTARTS:-3}" "$@"
