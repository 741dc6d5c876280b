#!/usr/bin/env bash
# What the kernel and the devices of this node have counted since it booted: one line, "counters NODE: NAME=VALUE ...".
# A job's controller reads it on every node before an attempt and after one that failed, and compares. Whatever cannot
# be read here (no GPU, no InfiniBand, a kernel log that users may not see) is left out.
set -uo pipefail

sys=${MQ_SYS:-/sys}
node=${SLURMD_NODENAME:-$(uname -n)}
counted=()

# Kills in the memory cgroup of the job. memory.events counts those of all cgroups below, ended ones too (cgroup v2).
count_memory() {
    local group kills
    group=$(sed -n 's/^0:://p' "${MQ_CGROUP:-/proc/self/cgroup}" 2>/dev/null)
    while [ -n "$group" ] && [ "$group" != / ]; do
        if [[ ${group##*/} == job_* ]]; then
            kills=$(awk '$1 == "oom_kill" {print $2}' "$sys/fs/cgroup$group/memory.events" 2>/dev/null)
            if [ -n "$kills" ]; then counted+=("oom_kill=$kills"); fi
            return
        fi
        group=${group%/*}
    done
}

# Xid errors by their number, and out-of-memory kills of any cgroup.
count_kernel() {
    local said count code
    said=$(timeout 10 dmesg 2>/dev/null) || return 0
    if [ -z "$said" ]; then return 0; fi
    counted+=("kernel_oom=$(grep -c 'Out of memory: Killed process\|Memory cgroup out of memory: Killed' <<<"$said")")
    while read -r count code; do
        counted+=("xid_$code=$count")
    done < <(sed -n 's/.*NVRM: Xid ([^)]*): \([0-9]*\).*/\1/p' <<<"$said" | sort -n | uniq -c)
}

count_gpus() {
    local index ecc remapped
    command -v nvidia-smi >/dev/null || return 0
    while IFS=', ' read -r index ecc remapped; do
        # Some devices answer [N/A] to some questions.
        if [[ $ecc =~ ^[0-9]+$ ]]; then counted+=("gpu${index}_ecc_uncorrected=$ecc"); fi
        if [[ $remapped =~ ^[0-9]+$ ]]; then counted+=("gpu${index}_remapped_rows=$remapped"); fi
    done < <(timeout 30 nvidia-smi --format=csv,noheader,nounits \
        --query-gpu=index,ecc.errors.uncorrected.volatile.total,remapped_rows.uncorrectable 2>/dev/null)
}

# Ports of InfiniBand and RoCE: how often the link went down or had to recover.
count_links() {
    local port name value
    for port in "$sys"/class/infiniband/*/ports/*; do
        [ -d "$port" ] || continue
        for name in link_downed link_error_recovery; do
            value=$(cat "$port/counters/$name" 2>/dev/null) || continue
            device=${port%/ports/*}
            if [[ $value =~ ^[0-9]+$ ]]; then counted+=("${device##*/}/${port##*/}_$name=$value"); fi
        done
    done
}

count_memory
count_kernel
count_gpus
count_links
echo "counters $node:${counted[*]:+ ${counted[*]}}"
