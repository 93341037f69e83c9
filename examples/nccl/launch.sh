#!/usr/bin/env bash
# Starts one host's part of a training job whose all-reduces can be followed on the wire:
#   NODES=4 NODE=0 MASTER=10.0.0.1 ./launch.sh train.py [ARGUMENTS..]
# Run it on every host, NODE counting from 0. What is not set here keeps the library's default.
set -eu

: "${NODES:?how many hosts}" "${NODE:?which of them this is, from 0}" "${MASTER:?address of host 0}"
channels=${CHANNELS:-1}
protocol=${PROTOCOL:-Simple}

# -- What goes over the mirrored port, and only that -------------------------------------------------------------------
# One RoCE port a host, the one whose switch port is mirrored. "=": exactly this name, port 1.
export NCCL_IB_HCA="=${HCA:-mlx5_0}:1"
# RDMA, or an error: over TCP sockets nothing would be seen.
export NCCL_NET=IB
# Ranks of one host would talk through shared memory, where no switch is: one rank a host, as this script starts them.
# The communicator's own set-up, and whatever else is plain TCP, stays off the mirrored port.
export NCCL_SOCKET_IFNAME="${CONTROL_IF:-eth0}"
export GLOO_SOCKET_IFNAME="${CONTROL_IF:-eth0}"

# -- Which collective, in which form: the plan says the same ------------------------------------------------------------
# A tree carries no message that is fully reduced on every edge; NVLS and CollNet reduce where no link shows it.
export NCCL_ALGO=Ring
# One encoding for all sizes; left alone, the library takes another for small buckets than for large ones.
export NCCL_PROTO="$protocol"
# The number of channels is part of the layout, and by default follows from what the library measures at start-up.
export NCCL_MIN_NCHANNELS="$channels" NCCL_MAX_NCHANNELS="$channels"
# Small operations would give up channels and threads, from thresholds that the topology sets: all operations use all.
export NCCL_THREAD_THRESHOLDS="0 0 0 0 0 0"
# A tuner plug-in may choose anything, anew for every operation.
export NCCL_TUNER_PLUGIN=none

# -- How a message becomes packets ---------------------------------------------------------------------------------------
# One queue pair a connection, whole messages, one write each, over one port.
export NCCL_IB_QPS_PER_CONNECTION=1
export NCCL_IB_SPLIT_DATA_ON_QPS=0
export NCCL_IB_ADAPTIVE_ROUTING=0
export NCCL_IB_MERGE_NICS=0

# -- Ways round the slots ------------------------------------------------------------------------------------------------
# Registered user buffers and graph capture write straight into the receiver's memory.
export NCCL_LOCAL_REGISTER=0
export NCCL_GRAPH_REGISTER=0
export NCCL_WIN_ENABLE=0

# -- What proves which queue pair is which edge and channel --------------------------------------------------------------
# The log names rings, channels and queue pair numbers; one file a process.
export NCCL_DEBUG=INFO
export NCCL_DEBUG_SUBSYS=INIT,NET,GRAPH,TUNING,COLL
export NCCL_DEBUG_FILE="${LOGS:-.}/nccl.%h.%p.log"

exec torchrun --nnodes "$NODES" --node-rank "$NODE" --nproc-per-node 1 \
    --master-addr "$MASTER" --master-port "${MASTER_PORT:-29500}" "$@"
