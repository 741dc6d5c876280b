#!/usr/bin/env bash
# Is this node fit to train? Prints one line, "healthcheck NODE: ok" or "healthcheck NODE: FAIL what; what", and ends
# with 0 or 1. A job's controller runs it on every node before the ranks and has the job avoid the nodes that fail.
set -uo pipefail

gpus=0 min_gpu_free_gib=0 min_memory_gib=0 disk='' min_disk_gib=1 clock=0 max_skew_s=30 max_gpu_temperature=0 loop=0 counters=0

usage() {
    cat <<'TEXT'
usage: healthcheck.sh [options]
  --gpus N               GPUs that must be there (0: do not look for any)
  --min-gpu-free-gib N   memory that must be free on each GPU: nothing else runs there
  --max-gpu-celsius N    hottest a GPU may be at rest (0: do not look)
  --min-memory-gib N     host memory that must be free
  --disk PATH            a directory that must be there, writable, with room
  --min-disk-gib N       room that it must have (1)
  --clock                print this node's time as well, which the caller compares with that of the others
  --max-skew-s N         largest difference that it allows, the start of this script included (30)
  --counters             print what slurm/counters.sh counts on this node as well
  --loop                 add up a tensor over all nodes of the job (NCCL, or gloo without GPUs); needs srun
Looked at besides: uncorrected ECC errors, GPUs that fell off the bus (Xid), clocks slowed down by heat or power.
TEXT
}

while [ $# -gt 0 ]; do
    case "$1" in
        --gpus) gpus=$2; shift 2 ;;
        --min-gpu-free-gib) min_gpu_free_gib=$2; shift 2 ;;
        --max-gpu-celsius) max_gpu_temperature=$2; shift 2 ;;
        --min-memory-gib) min_memory_gib=$2; shift 2 ;;
        --disk) disk=$2; shift 2 ;;
        --min-disk-gib) min_disk_gib=$2; shift 2 ;;
        --clock) clock=1; shift ;;
        --max-skew-s) max_skew_s=$2; shift 2 ;;
        --loop) loop=1; shift ;;
        --counters) counters=1; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "healthcheck.sh: no such option: $1" >&2; usage >&2; exit 2 ;;
    esac
done

node=${SLURMD_NODENAME:-$(uname -n)}
wrong=()

check_gpus() {
    local seen free ecc temperature slowed
    if ! command -v nvidia-smi >/dev/null; then
        wrong+=("nvidia-smi is missing: no driver")
        return
    fi
    if ! seen=$(timeout 60 nvidia-smi --query-gpu=index --format=csv,noheader 2>&1); then
        wrong+=("nvidia-smi fails: ${seen%%$'\n'*}")
        return
    fi
    seen=$(grep -c . <<<"$seen")
    if [ "$seen" -lt "$gpus" ]; then wrong+=("$seen of $gpus GPUs"); fi
    while IFS=', ' read -r index free ecc temperature slowed; do
        # Some devices answer [N/A] to some questions.
        if [[ $free =~ ^[0-9]+ ]] && [ $((${free%%.*} / 1024)) -lt "$min_gpu_free_gib" ]; then
            wrong+=("GPU $index has $((${free%%.*} / 1024)) GiB free")
        fi
        if [[ $ecc =~ ^[0-9]+$ ]] && [ "$ecc" -gt 0 ]; then wrong+=("GPU $index has $ecc uncorrected ECC errors"); fi
        if [[ $temperature =~ ^[0-9]+$ ]] && [ "$max_gpu_temperature" -gt 0 ] && [ "$temperature" -gt "$max_gpu_temperature" ]; then
            wrong+=("GPU $index is at $temperature C")
        fi
        # Hardware slowdown (0x8), heat (0x20, 0x40) and the power brake (0x80) of the throttle reasons.
        if [[ $slowed =~ ^0x[0-9a-fA-F]+$ ]] && [ $((slowed & 0xe8)) -ne 0 ]; then
            wrong+=("GPU $index is slowed down ($slowed)")
        fi
    done < <(timeout 60 nvidia-smi --format=csv,noheader,nounits \
        --query-gpu=index,memory.free,ecc.errors.uncorrected.volatile.total,temperature.gpu,clocks_throttle_reasons.active)
    if dmesg 2>/dev/null | grep -q 'NVRM: Xid.*fallen off the bus'; then wrong+=("a GPU has fallen off the bus"); fi
}

check_memory() {
    local free_kib
    free_kib=$(awk '/^MemAvailable:/ {print $2}' /proc/meminfo)
    if [ $((free_kib / 1048576)) -lt "$min_memory_gib" ]; then
        wrong+=("$((free_kib / 1048576)) GiB of host memory free, $min_memory_gib wanted")
    fi
}

check_disk() {
    local probe free_kib
    if [ ! -d "$disk" ]; then
        wrong+=("$disk is not there")
        return
    fi
    probe=$disk/.healthcheck.$node.$$
    if ! (: >"$probe") 2>/dev/null; then wrong+=("$disk cannot be written"); fi
    rm -f "$probe"
    free_kib=$(df -Pk "$disk" | awk 'NR == 2 {print $4}')
    if [ $((free_kib / 1048576)) -lt "$min_disk_gib" ]; then
        wrong+=("$((free_kib / 1048576)) GiB free on $disk, $min_disk_gib wanted")
    fi
}

check_loop() {
    local said
    # More than the loop's own timeout (180 s), whose error names the cause, and less than the controller's for the
    # whole script (300 s), after which it would not learn which node failed.
    if ! said=$(timeout 240 "${MQ_LOOP_PYTHON:-python3}" -P -m megatron_qwen.distributed.loop 2>&1); then
        wrong+=("the loop between nodes fails: $(tail -n 1 <<<"$said")")
    fi
}

# First of all, so that what other checks take is no difference of clocks.
if [ "$clock" = 1 ]; then echo "clock $node: $(date +%s), $max_skew_s s allowed"; fi
if [ "$gpus" -gt 0 ]; then check_gpus; fi
if [ "$min_memory_gib" -gt 0 ]; then check_memory; fi
if [ -n "$disk" ]; then check_disk; fi
if [ "$loop" = 1 ]; then check_loop; fi
if [ "$counters" = 1 ]; then bash "$(dirname "$0")/counters.sh"; fi

if [ "${#wrong[@]}" -gt 0 ]; then
    text=$(printf '%s; ' "${wrong[@]}")
    echo "healthcheck $node: FAIL ${text%; }"
    exit 1
fi
echo "healthcheck $node: ok"
