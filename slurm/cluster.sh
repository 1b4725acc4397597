#!/usr/bin/env bash
# A real SLURM with several nodes on this one machine, for trying things and for the tests. Not for production.
#   cluster.sh up             start it (installs SLURM with apt as root); prints `export SLURM_CONF=…` for eval
#   cluster.sh install        only the packages
#   cluster.sh down           stop it and everything that runs in it
#   cluster.sh kill NODE      power cut: the daemon, its job steps and all their processes
#   cluster.sh lose NODE      the daemon alone dies; what runs on the node runs on
#   cluster.sh start NODE     boot a node again
#   cluster.sh freeze|thaw NODE, cut|heal NODE     a hung node; a network cable pulled out (SEPARATE=net)
#   cluster.sh hide NODE DIR  the node sees an empty directory there, as one that has not mounted the storage
#   cluster.sh pids NODE      processes of a node
# Settings, by environment:
#   CLUSTER   directory of everything that belongs to it (/tmp/ftdist-slurm-UID; short: sockets lie in it)
#   NODES=2 CPUS=8 MEMORY=16000 GPUS=0     what each node claims to have
#   SEPARATE=auto|none|names|net           nodes with host names, or networks, of their own (need root); auto: names
#   TRACK=auto|linuxproc|cgroup            how SLURM knows a job's processes; cgroup: as in production (version 1, root)
#   PORT=26817                             the first of NODES + 1 TCP ports
#   WARN=all|tasks                         whom pre-emption warns: batch processes too, or SLURM's default
#   NAME=node                              what nodes are called (node1, node2, …); another for a second cluster
set -euo pipefail
umask 022 # munged refuses a socket that not everybody reaches
: "${CLUSTER:=/tmp/ftdist-slurm-$(id -u)}" "${NODES:=2}" "${CPUS:=8}" "${MEMORY:=16000}" "${GPUS:=0}" "${PORT:=26817}"
: "${SEPARATE:=auto}" "${TRACK:=auto}" "${NAME:=node}" "${WARN:=all}"
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$CLUSTER/slurm.conf
FREEZER=/sys/fs/cgroup/freezer

say() { echo "cluster.sh: $*" >&2; }
die() { say "$*"; exit 1; }
running() { grep -q '^State:[[:space:]]*[^ZX[:space:]]' "/proc/$1/status" 2>/dev/null; } # `kill -0` takes a zombie for alive
setting() { sed -n "s/^$1=//p" "$CLUSTER/settings" 2>/dev/null; }
address() { if [ "$SEPARATE" = net ]; then echo "10.77.0.$1"; else echo 127.0.0.1; fi; }

install_slurm() {
  local guard=/usr/sbin/policy-rc.d made=
  for program in slurmctld slurmd sbatch munged; do command -v $program >/dev/null || made=missing; done
  [ -n "$made" ] || return 0
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    die "no SLURM here; install slurmctld, slurmd, slurm-client, munge"
  fi
  made=
  [ -e $guard ] || { printf '#!/bin/sh\nexit 101\n' >$guard; chmod 755 $guard; made=1; } # no daemon by itself
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurmctld slurmd \
    slurm-client slurm-wlm-basic-plugins munge iproute2; } >/dev/null 2>&1 || { [ -z "$made" ] || rm $guard; die "apt-get failed"; }
  [ -z "$made" ] || rm $guard
}

choose() {
  if [ "$SEPARATE" = auto ]; then
    SEPARATE=none
    [ "$(id -u)" != 0 ] || ! unshare --uts true 2>/dev/null || SEPARATE=names
  fi
  if [ "$TRACK" = auto ]; then
    TRACK=linuxproc
    if [ "$(id -u)" = 0 ] && mkdir "$FREEZER/ftdist_probe" 2>/dev/null; then rmdir "$FREEZER/ftdist_probe"; TRACK=cgroup; fi
  fi
}

write_files() {
  local i list gres=''
  mkdir -p "$CLUSTER"/{state,log,run,dev}
  install -d -m 700 "$CLUSTER/munge"
  (umask 077; head -c 1024 /dev/urandom >"$CLUSTER/munge/key")
  printf 'SEPARATE=%s\nTRACK=%s\nNODES=%s\nNAME=%s\n' "$SEPARATE" "$TRACK" "$NODES" "$NAME" >"$CLUSTER/settings"
  : >"$CLUSTER/gres.conf"
  if [ "$GPUS" -gt 0 ]; then # a GPU is a character device whose name ends in a digit
    gres=" Gres=gpu:$GPUS"
    for ((i = 0; i < GPUS; i++)); do
      ln -sfn /dev/null "$CLUSTER/dev/gpu$i"
      for ((n = 1; n <= NODES; n++)); do echo "NodeName=$NAME$n Name=gpu File=$CLUSTER/dev/gpu$i" >>"$CLUSTER/gres.conf"; done
    done
  fi
  printf 'CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n' >"$CLUSTER/cgroup.conf"
  list=$(seq -s, -f "$NAME%g" "$NODES")
  { cat <<CONF
ClusterName=ftdist
SlurmctldHost=$(hostname -s)($([ "$SEPARATE" = net ] && echo 10.77.0.254 || echo 127.0.0.1))
SlurmctldPort=$PORT
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$CLUSTER/run/munge,cred_expire=5
StateSaveLocation=$CLUSTER/state
SlurmdSpoolDir=$CLUSTER/spool.%n
SlurmctldPidFile=$CLUSTER/run/slurmctld.pid
SlurmdPidFile=$CLUSTER/run/slurmd.%n.pid
SlurmctldLogFile=$CLUSTER/log/slurmctld.log
SlurmdLogFile=$CLUSTER/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/$TRACK
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
# clocks short enough that a fault shows in seconds
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000,batch_sched_delay=0
SlurmctldTimeout=10
SlurmdTimeout=10
KillWait=5
UnkillableStepTimeout=20
MinJobAge=900
ReturnToService=2
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
$([ "$WARN" = tasks ] || echo SlurmctldParameters=preempt_send_user_signal)
CONF
    for ((i = 1; i <= NODES; i++)); do
      echo "NodeName=$NAME$i NodeHostname=localhost NodeAddr=$(address "$i") Port=$((PORT + i)) CPUs=$CPUS RealMemory=$MEMORY$gres State=UNKNOWN"
    done
    echo "PartitionName=main Nodes=$list Default=YES MaxTime=INFINITE State=UP PriorityTier=10"
    echo "PartitionName=low Nodes=$list MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20"
  } >"$SLURM_CONF"
}

# Daemons hold no descriptor of ours, or a caller that reads our output waits for them.
quietly() {
  "$@" </dev/null >>"$CLUSTER/log/start.log" 2>&1 3>&- 9>&- || die "$1 failed: $(tail -n 1 "$CLUSTER/log/start.log")"
}

start_node() {
  local run="exec slurmd -N $1 -f $SLURM_CONF"
  mkdir -p "$CLUSTER/spool.$1"
  case $(setting SEPARATE) in
    net) quietly nsenter --net="/run/netns/ftd${1##*[!0-9]}" unshare --uts --mount sh -c "hostname $1; $run" ;;
    names) quietly unshare --uts --mount sh -c "hostname $1; $run" ;;
    *) quietly sh -c "$run" ;;
  esac
}

# Processes of a node: its daemon; its step daemons (known by the log that they hold open: they rewrite their own command
# lines) and their children; strays whose environment names the node.
tree() {
  local children child
  echo "$1"
  children=$(cat "/proc/$1"/task/*/children 2>/dev/null || true)
  for child in $children; do tree "$child"; done
}
# Of a pid file, if that process is still the program: numbers of processes are used again.
pid_in() { # FILE PROGRAM [WORDS OF ITS COMMAND LINE]
  local p
  p=$(cat "$CLUSTER/run/$1.pid" 2>/dev/null || true)
  if [ -n "$p" ] && running "$p" && [ "$(cat "/proc/$p/comm")" = "$2" ] &&
    tr '\0' ' ' <"/proc/$p/cmdline" | grep -qF -e "${3:-$CLUSTER}"; then echo "$p"; fi
}
daemon_of() { pid_in "slurmd.$1" slurmd "-N $1 -f $SLURM_CONF"; }
pids_of() {
  local p
  { daemon_of "$1"
    for p in /proc/[0-9]*; do
      if grep -q '^slurmstepd' "$p/comm" 2>/dev/null; then
        # shellcheck disable=SC2010  # the links' targets, not names
        if ls -l "$p/fd" 2>/dev/null | grep -qF "$CLUSTER/log/slurmd.$1.log"; then tree "${p#/proc/}"; fi
      elif [ "$( { tr '\0' '\n' <"$p/environ"; } 2>/dev/null | grep -cxF -e "SLURMD_NODENAME=$1" -e "SLURM_CONF=$SLURM_CONF")" = 2 ]; then
        echo "${p#/proc/}"
      fi
    done; } | sort -un
}
signal_node() { # SIGNAL NODE
  local list
  list=$(pids_of "$2")
  # shellcheck disable=SC2086
  [ -z "$list" ] || kill -"$1" $list 2>/dev/null || true
}

up() {
  local i
  install_slurm
  choose
  if [ -e "$CLUSTER" ] && [ ! -f "$CLUSTER/settings" ] && [ -n "$(ls -A "$CLUSTER")" ]; then
    die "$CLUSTER holds other files; choose another CLUSTER"
  fi
  [ ! -f "$CLUSTER/settings" ] || down
  rm -rf "$CLUSTER"
  mkdir -p "$CLUSTER"
  write_files
  [ "$SEPARATE" != net ] || networks
  quietly munged --key-file="$CLUSTER/munge/key" --socket="$CLUSTER/run/munge" --pid-file="$CLUSTER/run/munged.pid" \
    --log-file="$CLUSTER/log/munged.log" --seed-file="$CLUSTER/munge/seed" --num-threads=2
  quietly slurmctld -f "$SLURM_CONF"
  for ((i = 1; i <= NODES; i++)); do start_node "$NAME$i"; done
  for ((i = 0; i < 300; i++)); do
    if [ "$(sinfo -h -N -p main -t idle -o %N 2>/dev/null | sort -u | wc -l)" = "$NODES" ]; then
      say "$NODES nodes (SEPARATE=$SEPARATE TRACK=$TRACK) in $CLUSTER"
      echo "export SLURM_CONF=$SLURM_CONF"
      return 0
    fi
    sleep 0.1
  done
  tail -n 5 "$CLUSTER"/log/*.log >&2
  die "SLURM did not come up in 30 s"
}

without_networks() {
  local n
  for n in $(ip netns list | awk '/^ftd[0-9]/ {print $1}'); do ip netns del "$n"; done
  ip link del ftdbr 2>/dev/null || true
}
networks() { # one set on a machine
  local i
  without_networks
  ip link add ftdbr type bridge
  ip addr add 10.77.0.254/24 dev ftdbr
  ip link set ftdbr up
  for ((i = 1; i <= NODES; i++)); do
    ip netns add "ftd$i"
    ip link add "ftdv$i" type veth peer name eth0 netns "ftd$i"
    ip link set "ftdv$i" master ftdbr up
    ip -n "ftd$i" link set lo up
    ip -n "ftd$i" addr add "10.77.0.$i/24" dev eth0
    ip -n "ftd$i" link set eth0 up
  done
}

down() {
  local n p name
  n=$(setting NODES)
  for ((i = 1; i <= ${n:-0}; i++)); do signal_node KILL "$(setting NAME)$i"; done
  for name in slurmctld munged; do
    p=$(pid_in "$name" "$name")
    [ -z "$p" ] || kill -KILL "$p" 2>/dev/null || true
    while [ -n "$p" ] && running "$p"; do sleep 0.05; done
  done
  [ "$(setting SEPARATE)" != net ] || without_networks
  if [ "$(setting TRACK)" = cgroup ]; then
    for ((i = 1; i <= ${n:-0}; i++)); do
      find "$FREEZER/slurm_$(setting NAME)$i" -depth -type d -exec rmdir {} \; 2>/dev/null || true
    done
  fi
  rm -rf "$CLUSTER"
}

action=${1:-} node=${2:-}
case $action in
  install) install_slurm ;;
  up) up ;;
  down) [ ! -f "$CLUSTER/settings" ] || down ;;
  kill | lose | start | freeze | thaw | cut | heal | hide | pids)
    [ -f "$CLUSTER/settings" ] || die "no cluster in $CLUSTER"
    [[ $node =~ ^[a-z]+[0-9]+$ ]] || die "$action: which node? node1 …"
    case $action in
      kill) signal_node KILL "$node"; rm -f "$CLUSTER/run/slurmd.$node.pid" "$CLUSTER/spool.$node/${node}"_* ;;
      lose) p=$(daemon_of "$node"); [ -n "$p" ] || die "lose: $node has no daemon"; kill -KILL "$p" ;;
      start) start_node "$node" ;;
      freeze) signal_node STOP "$node" ;;
      thaw) signal_node CONT "$node" ;;
      cut) ip link set "ftdv${node##*[!0-9]}" down ;;
      heal) ip link set "ftdv${node##*[!0-9]}" up ;;
      hide) nsenter --mount="/proc/$(daemon_of "$node")/ns/mnt" mount -t tmpfs none "$3" ;;
      pids) pids_of "$node" ;;
    esac ;;
  *) sed -n '2,21s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
