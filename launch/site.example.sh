# shellcheck shell=bash
# What belongs to one cluster: copy this to launch/site.sh and uncomment what it needs. It is read on
# the login node (launch/submit.sh) and on every node (launch/env.sh).

# module load cuda/12.8

# What sbatch takes where no option says otherwise.
# export SBATCH_ACCOUNT=ACCOUNT
# export SBATCH_PARTITION=PARTITION

# The network between the nodes.
# export NCCL_SOCKET_IFNAME=ib0
# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5

# Nodes without internet.
# export HF_HUB_OFFLINE=1
