#!/usr/bin/env bash
# One task of a multi-node job: start this node's ranks. Run inside `srun`, where SLURM_NODEID is this node's own.
#   node.sh ENGINE HEAD PORT PROCESSES overrides…
set -euo pipefail
engine=$1 head=$2 port=$3 processes=$4
shift 4
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
nodes=${SLURM_NNODES:-1}
config=$(mktemp)
trap 'rm -f "$config"' EXIT
sed "s#deepspeed_config_file: launch/#deepspeed_config_file: $here/#" "$here/$engine.yaml" >"$config"
[ -e /dev/nvidia0 ] || export DS_ACCELERATOR=cpu
python3 -m accelerate.commands.launch --config_file "$config" \
  --num_machines "$nodes" --machine_rank "${SLURM_NODEID:-0}" --num_processes "$((nodes * processes))" \
  --main_process_ip "$head" --main_process_port "$port" -m ftdist.train "$@"
