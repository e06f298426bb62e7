#!/usr/bin/env bash
# Checks and measures megabase on a machine with one GPU and no network, in calls of less than 10 minutes each:
# STAGES="wheels checks tests zero sequence learning", what must be right, and what is learnt; STAGES="wheels memory
# offload rank longest", long sequences; STAGES="wheels attention model", the comparison with the peers; STAGES="wheels
# rounds profile", the two generations of attention kernels, in less than 8 minutes.
#
#   benchmarks/gpu.sh [WHEELS]         WHEELS: folder of missing packages (benchmarks/gpu_wheels.sh); default .whl
#
# The machine has Python 3.12, torch for CUDA, triton, pytorch-lightning, transformers, pyarrow, matplotlib and rich.
# Stages: the wheels; the kernels against the reference; the kernels' tests; ZeRO 1 to 3 under NCCL in bf16 and fp16,
# with a resume that must be exact; one sequence over two processes, and overlap of communication; memory against length;
# 4M positions with streams in host memory; one of 8 ranks that share a sequence of up to 4M positions; the longest
# context that trains; how soon models learn to recall; bench attention; bench model; kernels with one launch for each
# round against all rounds in one launch: checks, times, time by kernel. Each stage has a time limit, and its failure does
# not stop the others. Prints a table at the end. The exit code is 1 if a stage failed or reached its limit.
#
# Environment: OUT, the folder of all results (default ./gpu-results; at most 8 files in each of these calls, no
# subfolders). PYTHON (default python3). SITE, where the wheels are installed (default /tmp/site). MEGABASE_COMMIT, the
# commit to write into the JSON if there is no .git. DEVICE=cpu runs all stages with tiny sizes, to test this script.
# STAGES: which (default: all).
set -u
cd "$(dirname "$0")/.." || exit 2
# A copy of a checkout may have lost its links.
for name in models datamodules pipeline configs slurm; do
    [ -e "megabase/$name" ] || ln -s "../$name" "megabase/$name"
done

WHEELS=${1:-${WHEELS:-.whl}}
OUT=$(mkdir -p "${OUT:-gpu-results}" && cd "${OUT:-gpu-results}" && pwd) || exit 2
PYTHON=${PYTHON:-python3}
SITE=${SITE:-/tmp/site}
DEVICE=${DEVICE:-cuda}
STAGES=${STAGES:-wheels checks tests zero sequence memory offload rank longest learning attention model rounds profile}
LOG=$OUT/log.txt
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
export PYTHONPATH="$PWD:$SITE${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export MEGABASE_CACHE=${MEGABASE_CACHE:-$WORK/cache}
: >"$LOG"
BAD=0
TABLE=""

# stage NAME SECONDS COMMAND...: run the command with a time limit, and record how it ended.
stage() {
    local name=$1 limit=$2 began=$SECONDS code result
    shift 2
    case " $STAGES " in *" $name "*) ;; *) return 0 ;; esac
    printf '\n== %s: %s\n' "$name" "$*" | tee -a "$LOG"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$LOG"
    code=${PIPESTATUS[0]}
    case $code in
        0) result=ok ;;
        124 | 137) result="stopped after $limit s" BAD=1 ;;
        *) result="FAILED ($code)" BAD=1 ;;
    esac
    TABLE+=$(printf '%-10s %5d s  %s' "$name" $((SECONDS - began)) "$result")$'\n'
}

wheels() {
    if compgen -G "$WHEELS/*.whl" >/dev/null; then
        "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" "$WHEELS"/*.whl
    else
        echo "no wheels in $WHEELS: using the installed packages"
    fi
    "$PYTHON" -c 'import torch; print("torch", torch.__version__, "on", torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU")'
}

tests() {
    if ! "$PYTHON" -c 'import pytest, hypothesis' 2>/dev/null; then
        echo "no pytest installed: skipping the tests"
        return 0
    fi
    # In parallel if pytest-xdist is installed: most of the time is compiling kernels, one core each.
    local parallel=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && parallel=(-n auto)
    "$PYTHON" -m pytest -q -m "not slow" -p no:cacheprovider --basetemp="$WORK/pytest" "${parallel[@]}" \
        tests/models/test_fused.py tests/models/attention/kernels 2>&1 | tail -15
    return "${PIPESTATUS[0]}"
}

# Real runs on phage lambda, one rank each, in parallel. Each trains 8 steps; then its last checkpoint is deleted and the
# run resumes from step 4. The second journal must equal the first byte for byte.
zero() {
    local variant pid pids=() bad=0
    "$PYTHON" -m megabase.pipeline.cli prepare tests/data/lambda_phage.fna.gz "$WORK/lambda" || return 1
    for variant in 2-bf16-true 3-bf16-false 1-"$HALF"-true 3-"$HALF"-true; do
        resumed "$variant" >"$WORK/zero-$variant.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || bad=1; done
    tail -n 100 "$WORK"/zero-*.log
    return $bad
}

# resumed STAGE-PRECISION-BACKGROUND
resumed() {
    local stage precision background run=$WORK/zero-$1 again
    IFS=- read -r stage precision background <<<"$1"
    for again in first second; do
        "$PYTHON" -m megabase.pipeline.cli train run.root="$WORK" run.name="zero-$1" \
            data.shards="$WORK/lambda" data.length=1024 data.global_batch=4 data.micro_batch=2 model.dim=128 \
            model.heads=2 model.depth=4 model.dropout=0.1 model.attention_dropout=0.1 trainer.devices=1 \
            trainer.max_steps=8 trainer.log_every_steps=1 trainer.eval_every_steps=0 optim.warmup_steps=1 \
            zero.stage="$stage" trainer.precision="$precision" checkpoint.background="$background" \
            checkpoint.every_steps=4 tracking.enabled=false || return 1
        if [ $again = first ]; then
            cp "$run/metrics.jsonl" "$run.jsonl"
            rm -r "$run/checkpoints/step-8"
        fi
    done
    cmp "$run/metrics.jsonl" "$run.jsonl" || return 1
    "$PYTHON" - "$run/metrics.jsonl" <<'PYTHON'
import json, math, sys
losses = [row["loss"] for row in map(json.loads, open(sys.argv[1])) if "loss" in row]
print("losses, the same after a resume:", *(f"{loss:.4f}" for loss in losses))
assert len(losses) == 8 and all(map(math.isfinite, losses)), "steps are missing, or losses are not finite"
PYTHON
}

# Time by kernel of both generations.
profile() {
    local backends=triton,triton-together
    # shellcheck disable=SC2086  # the options are words
    "$PYTHON" -m benchmarks.gpu_profile attention --device "$DEVICE" $PROFILED --head-dim 128 --backends $backends \
        --show 12 --json "$OUT/profile.json" &&
        "$PYTHON" -m benchmarks.gpu_profile attention --device "$DEVICE" $PROFILED --head-dim 64 --backends $backends --show 12 &&
        "$PYTHON" -m benchmarks.gpu_profile model --device "$DEVICE" $PROFILED_MODEL --backends $backends --show 12
}

export -f wheels tests zero resumed profile
HALF=$([ "$DEVICE" = cuda ] && echo 16 || echo 32)  # DeepSpeed has no fp16 on CPUs
export PYTHON SITE WHEELS WORK OUT HALF DEVICE

if [ "$DEVICE" = cuda ]; then
    SLOW=1 CASES=40 ATTENTION="--lengths 4k,8k,16k,32k,64k,128k,256k,512k,1M --seconds 4 --repeat 9"
    MODEL="--lengths 4k,16k,64k --depths 2,6,12,24,48 --dim 1024 --depth 12 --heads 16 --chunk 128 --dtype bf16 --seconds 3 --repeat 7"
    LEARNING="--length 65536 --tokens 131072 --dim 256 --heads 4 --chunk 64 --copy 256 --steps 250 --models ours,paper,full"
    LONGEST="--lengths 64k --dim 512 --depth 12 --heads 8 --chunk 128 --dtype bf16 --seconds 25"
    MEMORY="--lengths 256k,1M --dim 1024 --depth 4 --heads 8 --dtype bf16 --layers local+lsh,local,lsh"
    OFFLOAD="--lengths 4M --dim 1024 --depth 10 --heads 8 --dtype bf16 --layers local+lsh --offload-streams"
    RANK="--lengths 1M,4M --dim 1024 --depth 10 --heads 8 --chunk 128 --dtype bf16 --seconds 20"
    ROUNDS="--lengths 16k,64k,256k,1M --seconds 4 --repeat 9" TOGETHER=triton-together
    PROFILED="--lengths 16k,64k,256k,1M" PROFILED_MODEL="--lengths 16k,64k"
else
    SLOW=4 CASES=1 ATTENTION="--lengths 256,512 --seconds 2 --repeat 2"
    MODEL="--lengths 256,512 --depths 2,4 --dim 64 --seconds 2 --repeat 2"
    LEARNING="--length 512 --steps 4 --every 2 --models ours,full"
    LONGEST="--lengths 256 --dim 32 --depth 2 --seconds 0.5"
    MEMORY="--lengths 1k,4k --dim 32 --depth 2" OFFLOAD="--lengths 1k --dim 32 --depth 2"  # a CPU has nothing to offload
    RANK="--lengths 2k,4k --dim 32 --depth 2 --heads 8 --seconds 0.5"
    ROUNDS="--lengths 256,512 --seconds 2 --repeat 2" TOGETHER=native
    PROFILED="--lengths 256,512 --dim 128 --calls 1" PROFILED_MODEL="--lengths 256 --dim 64 --depth 2 --calls 1"
fi
export PROFILED PROFILED_MODEL
# shellcheck disable=SC2086  # the options are words
{
    stage wheels 30 bash -c wheels
    stage checks 150 "$PYTHON" -m benchmarks.gpu_checks --device "$DEVICE" --cases $CASES --json "$OUT/checks.json"
    stage tests 130 bash -c tests
    stage zero $((90 * SLOW)) bash -c zero
    stage sequence $((90 * SLOW)) "$PYTHON" -m benchmarks.gpu_sequence --device "$DEVICE" --json "$OUT/sequence.json"
    stage memory 100 "$PYTHON" -m benchmarks.memory --device "$DEVICE" $MEMORY --json "$OUT/memory.json"
    stage offload 170 "$PYTHON" -m benchmarks.memory --device "$DEVICE" $OFFLOAD --json "$OUT/offload.json"
    stage rank 100 "$PYTHON" -m megabase.pipeline.cli bench model --device "$DEVICE" $RANK --sequence-ranks 8 \
        --contestants ours --depths 0 --repeat 1 --longest --json "$OUT/rank.json"
    stage longest 110 "$PYTHON" -m megabase.pipeline.cli bench model --device "$DEVICE" $LONGEST --contestants ours \
        --depths 0 --repeat 1 --longest --json "$OUT/longest.json"
    stage learning 140 "$PYTHON" -m benchmarks.learning recall --device "$DEVICE" $LEARNING --json "$OUT/recall.json"
    stage attention 240 "$PYTHON" -m megabase.pipeline.cli bench attention --device "$DEVICE" $ATTENTION --json "$OUT/attention.json"
    stage model 200 "$PYTHON" -m megabase.pipeline.cli bench model --device "$DEVICE" $MODEL --json "$OUT/model.json"
    stage rounds 60 "$PYTHON" -m benchmarks.gpu_checks --device "$DEVICE" --cases $CASES --seconds 30 --backends $TOGETHER
    stage rounds 150 "$PYTHON" -m megabase.pipeline.cli bench attention --device "$DEVICE" $ROUNDS \
        --contestants ours,ours-$TOGETHER,sdpa-flash,sdpa-cudnn --json "$OUT/rounds.json"
    stage profile 210 bash -c profile
}

printf '\n%s' "$TABLE" | tee -a "$LOG"
printf '%-10s %5d s  %s\n' "in all" $SECONDS "$OUT" | tee -a "$LOG"
exit $BAD
