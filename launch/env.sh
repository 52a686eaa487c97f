# shellcheck shell=bash
# Settings of the environment of every process, in one place. launch/torchrun.sh reads this file on
# each node, inside the container where there is one. What is already set stays as it is, so
# `NCCL_DEBUG=INFO launch/torchrun.sh ...` and a variable that sbatch passed on win.
#
# What belongs to one cluster (modules to load, interfaces, account) goes into launch/site.sh, which
# git ignores and which is read first; start from launch/site.example.sh.

# shellcheck source=/dev/null
[[ ! -f launch/site.sh ]] || source launch/site.sh

# --- stopping and restarting ---

# Asked to stop, the trainer finishes its step and saves: torchrun's 30 seconds are too few for that.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}

# Seconds: join_timeout is how long the nodes wait for one another at a start, last_call_timeout how
# long a start with fewer than all nodes waits for the rest. A node is taken for dead after
# keep_alive_interval * keep_alive_max_attempt.
RDZV_CONF=${RDZV_CONF:-join_timeout=600,last_call_timeout=30,keep_alive_interval=5,keep_alive_max_attempt=3}

# torch keeps the store of a first meeting for later ones, and does not tell nodes that join then where
# it is: they would wait for a minute and end the job (seen with torch 2.13).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}

# --- NCCL: between GPUs ---

# One line for what goes wrong. INFO tells which interfaces and paths were chosen.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# Which interfaces NCCL and gloo talk through. Unset, both guess; on nodes with several networks name
# it in launch/site.sh: NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 (a prefix will do), and
# NCCL_IB_HCA=mlx5 for the InfiniBand adapters.

# An error or a timeout in a collective ends the process, so that torchrun can start all anew.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-3}

# The flight recorder is on by itself: the last collectives of every rank go to the run's folder when
# one does not come back (docs/faults.md). TORCH_FR_BUFFER_SIZE=0 switches it off.

# --- memory and threads ---

# Blocks of many sizes come and go, gathered parameters above all: growing segments do not fragment.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}

# Processes that share a node would otherwise each start a thread for every core of it.
if ((${gpus:-1} > 1)); then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi

# --- Python ---

# Lines appear in the log when they are printed, and a crash in native code prints a stack.
export PYTHONUNBUFFERED=${PYTHONUNBUFFERED:-1}
export PYTHONFAULTHANDLER=${PYTHONFAULTHANDLER:-1}
# A forked tokenizer's threads would deadlock.
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
