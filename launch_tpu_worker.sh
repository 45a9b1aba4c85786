#!/usr/bin/env bash
# What launch_tpu.sh does on a worker of a TPU pod: it copies this file there and calls it over ssh as
#
#   bash imm_jax_run/launch_tpu_worker.sh install VERSION | run [ARGUMENT...] | stop GRACE | status | tail
#
# All of it lies in one folder, ~/imm_jax_run: code.tar.gz, code, version, venv, args, pid, run.log, bucket.
set -euo pipefail

note() { printf '%s: %s\n' "$HOSTNAME" "$1" >&2; }
die() { note "$1"; exit 1; }

# The command line is looked at, too: after a reboot the number may belong to another process.
alive() { [[ -s pid ]] && grep --quiet --no-messages --fixed-strings imm_jax.main "/proc/$(<pid)/cmdline"; }

make_venv() {
  local python
  for python in python3 python3.14 python3.13 python3.12 python3.11; do
    rm -rf venv
    if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && "$python" -m venv venv; then
      return
    fi
  done
  # Ubuntu 22.04, which images of TPU VMs are made from, has 3.10: uv fetches a newer one.
  rm -rf venv
  python3 -m pip install --quiet --user uv
  python3 -m uv venv --quiet --seed --python=3.12 venv
}

install() {  # VERSION
  rm -rf code
  mkdir code
  tar -xzf code.tar.gz -C code
  echo "$1" >version
  venv/bin/python -m pip --version >/dev/null 2>&1 || make_venv
  venv/bin/python -m pip install --quiet --editable './code[tpu]'
  note "installed $1"
}

# A run directory needs a file system that all hosts share: the bucket, seen as one. Directories are renamed in it.
mount_bucket() {  # NAME
  if mountpoint --quiet bucket; then return; fi
  if ! command -v gcsfuse >/dev/null; then
    local key=/usr/share/keyrings/cloud.google.asc source=https://packages.cloud.google.com/apt
    curl --silent --show-error --fail $source/doc/apt-key.gpg | sudo tee $key >/dev/null
    echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release --codename --short) main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
    sudo apt-get --quiet=2 update
    sudo apt-get --quiet=2 --yes install gcsfuse >/dev/null
  fi
  mkdir -p bucket
  gcsfuse --implicit-dirs --rename-dir-limit=1000000 "$1" bucket >/dev/null || die "gcsfuse cannot mount gs://$1"
}

# Training states, the large and frequent files of a run, go to the bucket past the mount.
place_workdir() {  # sets args as imm_jax.main is to have them, from those that were given
  local arg path given=("${args[@]}")
  args=()
  for arg in "${given[@]}"; do
    if [[ $arg == --workdir=gs://* ]]; then
      path=${arg#--workdir=gs://}
      mount_bucket "${path%%/*}"
      args+=("--workdir=$PWD/bucket/${path#*/}" "--config.sft.state_dir=gs://$path/states")
    else
      args+=("$arg")
    fi
  done
}

run() {  # ARGUMENT of imm_jax.main...; none: those of the last time
  # No error, for gcloud repeats a command whose connection broke.
  if alive; then note "runs already as $(<pid)"; return; fi
  if (($#)); then printf '%s\0' "$@" >args; fi
  [[ -s args ]] || die "no run was started here"
  local args tick
  mapfile -d '' -t args <args
  place_workdir
  printf '== %s %s %s\n' "$(date --utc --iso-8601=seconds)" "$(<version)" "${args[*]@Q}" >>run.log
  cd code
  # A session of its own outlives ssh. This is no job of an interactive shell, so setsid does not fork: $! is the run.
  PYTHONUNBUFFERED=1 setsid ../venv/bin/python -m imm_jax.main "${args[@]}" </dev/null >>../run.log 2>&1 &
  cd ..
  echo "$!" >pid
  for ((tick = 0; tick < 20; tick++)); do
    if alive; then note "runs as $!"; return; fi
    sleep 0.1
  done
  die "the run ended at once: $(tail --lines=1 run.log)"
}

stop() {  # GRACE: seconds that the run has to save
  if ! alive; then note "nothing runs"; return; fi
  local pid tick
  pid=$(<pid)
  note "SIGTERM to $pid"
  kill -TERM "$pid" || true
  for ((tick = 0; tick < $1 * 5; tick++)); do
    alive || break
    sleep 0.2
  done
  if alive; then note "no end after $1 s, SIGKILL"; fi
  kill -KILL -- "-$pid" 2>/dev/null || true  # the whole session: the run may have left children behind
  while alive; do sleep 0.1; done
  note "stopped"
}

status() {
  if alive; then note "runs as $(<pid)"; else note "nothing runs"; fi
  if [[ -s run.log ]]; then note "$(tail --lines=1 run.log)"; fi
}

tail_log() {
  local flags=(--lines=100 --follow=name)
  if [[ -s pid ]]; then flags+=(--pid="$(<pid)"); fi
  exec tail "${flags[@]}" run.log
}

cd "$(dirname "$0")"
case $1 in
  install | run | stop | status) "$@" ;;
  tail) tail_log ;;
  *) die "no command '$1'" ;;
esac
