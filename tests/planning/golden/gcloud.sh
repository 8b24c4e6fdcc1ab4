#!/usr/bin/env bash
# llama-8b on v5p:4x4x8, 32 hosts; written by scripts/launch.py
# Start it where it can stay, in tmux or on a small machine. It deletes the TPUs when the run is finished,
# when no retry would help, and when the retries are used up; Ctrl-C leaves them. Started again, it goes on.
set -u
trap 'kill $(jobs -p) 2>/dev/null; exit 130' INT TERM
name=llama-8b
nodes=(llama-8b)
place=(--zone=us-east5-a --project=p)

read -r -d '' attempt <<'END_OF_ATTEMPT'
if old=$(cat /tmp/llama-8b.pid 2>/dev/null) && kill -TERM "$old" 2>/dev/null; then
  while kill -0 "$old" 2>/dev/null; do sleep 1; done
fi
echo $$ > /tmp/llama-8b.pid
export PYTHONUNBUFFERED=1 JAX_COMPILATION_CACHE_DIR=gs://b/compilation_cache
cd llm_jax || exit 1
timeout --kill-after=300 86400 python scripts/train.py --config=configs/llama_8b.py --workdir=gs://b/llama_8b '--config.data.text=it'"'"'s $HOME/a b/*.txt' &
run=$!
trap 'kill -TERM "$run"' TERM
wait "$run"; code=$?
while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done  # a trap ends wait early
[ "$code" -eq 0 ] || exit "$code"
python scripts/launch.py --finished=gs://b/llama_8b || exit 75
END_OF_ATTEMPT

create() {
  gcloud compute tpus queued-resources create "$name" "${place[@]}" \
    --accelerator-type=v5p-256 --runtime-version=v2-alpha-tpuv5 --node-id=llama-8b --spot --quiet
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${place[@]}" \
    --format='value(state.state)' 2>/dev/null
}

delete() {
  gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

ready() {
  while true; do
    case "$(state)" in
      ACTIVE) return 0 ;;
      "") create || return 1 ;;
      FAILED | SUSPENDED) delete ;;
    esac
    sleep 30
  done
}

on_all_workers() {
  local workers=() worst=0
  for node in "${nodes[@]}"; do
    gcloud compute tpus tpu-vm ssh "$node" "${place[@]}" --worker=all --quiet --command="$1" &
    workers+=("$!")
  done
  for worker in "${workers[@]}"; do wait "$worker" || worst=$?; done
  return "$worst"
}

finish() {
  delete
  exit "$1"
}

for ((try = 0; try <= 50; try++)); do
  if ready; then
    on_all_workers "$attempt"; code=$?
    case "$code" in
      0) echo "$name is finished" >&2; finish 0 ;;
      2 | 124) echo "$name cannot go on: exit code $code" >&2; finish "$code" ;;
    esac
    echo "try $try of $name ended with exit code $code; the next goes on from the newest checkpoint" >&2
  fi
  sleep 30
done
finish 1
