#!/usr/bin/env bash
# Starts, restarts, stops and tails a run on a Cloud TPU pod; `./launch_tpu.sh --help` says how.
#
# This half runs here: it checks, and calls gcloud. launch_tpu_worker.sh is the half that is copied to every worker and
# called there, so that nothing but plain words passes through ssh, which parses them once more.
set -euo pipefail

usage() {
  cat <<'END'
usage: launch_tpu.sh COMMAND --name=NAME [OPTION...] [-- OVERRIDE...]

Commands, each for all workers of the TPU:
  start    makes the TPU if there is none, ships the working tree (all files but those that git ignores), installs it,
           stops an earlier run and starts `python -m imm_jax.main`; what follows `--` is passed on to it
  restart  stops the run and starts it again: same code, same arguments
  stop     SIGTERM, so that the run saves; SIGKILL after --grace seconds
  tail     follows the log of one worker until the run ends
  status   the TPU's state, and what its workers do
  delete   gives the TPU back (gcloud asks first); stop before, so that the run saves

Options (--key=value or --key value):
  --name=NAME         of the TPU or queued resource; it holds one run at a time
  --zone=ZONE         default: gcloud's compute/zone
  --project=PROJECT   default: gcloud's
  --dry_run           prints each command that would change something and runs none; checks and queries are made
  --ssh_flag=FLAG     more for gcloud's ssh and scp, for instance --ssh_flag=--internal-ip; may be repeated
  --grace=SECONDS     that a run has to save before SIGKILL (start, restart, stop); default 300
start:
  --config=FILE       as for imm_jax.main
  --workdir=DIR       gs://BUCKET/DIR, which the workers mount with gcsfuse, or a folder that they share
  --type=TYPE         v5litepod-16, v5p-32, v6e-16, ...; needed where the TPU does not exist
  --version=VERSION   of the TPU VM's software; default: by type
  --queued            ask for a queued resource and wait until it is there
  --slices=N          multislice: so many slices of that type, queued
  --poll=SECONDS      between two looks at the queue; default 30
  --spot              cheaper, may be preempted at any time; start again resumes
  --create_flag=FLAG  more for gcloud's create, for instance --create_flag=--reserved; may be repeated
restart:
  --install           ships and installs the working tree, as start does
tail:
  --worker=N          whose log; default 0
  --slice=N           in which slice; default 0

Examples:
  launch_tpu.sh start --name=imm --type=v5litepod-16 --config=configs/common.py --workdir=gs://my-bucket/imm \
    -- --config.model=Qwen/Qwen2.5-0.5B-Instruct --config.merge.base_weight=0.4
  launch_tpu.sh start --name=two --type=v6e-16 --slices=2 --spot --config=configs/common.py --workdir=gs://my-bucket/two
  launch_tpu.sh tail --name=imm
  launch_tpu.sh stop --name=imm
END
}

note() { printf 'launch_tpu.sh: %s\n' "$1" >&2; }
die() { note "$1"; exit 1; }
misuse() { note "$1 (see launch_tpu.sh --help)"; exit 2; }

run() {  # COMMAND...: what changes something goes through here
  if ((!dry_run)); then "$@"; return; fi
  local words
  printf -v words '%q ' "$@"
  echo "${words% }"
}

# Runs a command that changes nothing: its output in $reply, or what it complained of in $complaint, on one line.
query() {
  local api=tpu
  reply=$("$@" 2>"$tmp/complaint" </dev/null) && return
  complaint=$(tr -s '[:space:]' ' ' <"$tmp/complaint")
  if [[ $complaint == *SERVICE_DISABLED* || $complaint == *'has not been used in project'* ]]; then
    if [[ " $* " == *" quotas "* ]]; then api=cloudquotas; fi
    complaint="its API is off: gcloud services enable $api.googleapis.com --project=$project"
  fi
  return 1
}

on_workers() {  # ssh|scp ARGUMENT...: gcloud's, for all workers at once
  local all=(--worker=all)
  # By default the workers of a large pod take turns; those of the first turn would wait for the others in vain.
  if [[ $kind == queued-resources ]]; then all+=(--node=all --batch-size=all); fi
  run gcloud compute tpus "$kind" "$@" "${where[@]}" "${all[@]}" "${ssh_flags[@]}"
}

call_workers() {  # WORD...: a call of launch_tpu_worker.sh
  local words
  printf -v words '%q ' bash imm_jax_run/launch_tpu_worker.sh "$@"
  on_workers ssh "$name" --command="${words% }" || die "$1 failed on a worker of $name (messages above)"
}

check_account() {
  command -v gcloud >/dev/null || die "gcloud is not installed (https://cloud.google.com/sdk/docs/install)"
  query gcloud auth list --filter=status:ACTIVE --format='value(account)' || die "gcloud auth list: $complaint"
  [[ -n $reply ]] || die "gcloud is not logged in: gcloud auth login"
  if [[ -z $project ]]; then
    query gcloud config get project || die "gcloud config get project: $complaint"
    project=$reply
  fi
  [[ -n $project ]] || die "no project: give --project, or gcloud config set project PROJECT"
  if [[ -z $zone ]]; then
    query gcloud config get compute/zone || die "gcloud config get compute/zone: $complaint"
    zone=$reply
  fi
  [[ -n $zone ]] || die "no zone: give --zone, or gcloud config set compute/zone ZONE"
  where=(--zone="$zone" --project="$project")
}

find_tpu() {  # sets kind and state; no state: there is none
  local existing='' field='state.state,tpu.nodeSpec[0].node.acceleratorType'
  reply=''
  for kind in queued-resources tpu-vm; do
    query gcloud compute tpus "$kind" describe "$name" "${where[@]}" --format="value[separator=' ']($field)" && break
    [[ $complaint == *NOT_FOUND* ]] || die "the TPU API does not say whether there is a $name in $zone: $complaint"
    field='state,acceleratorType'
  done
  read -r state existing <<<"$reply"
  [[ -z $type || -z $existing || $existing == "$type" ]] || die "$name is a $existing, not a $type: give another --name"
}

need_ready() {
  [[ -n $state ]] || die "there is no TPU or queued resource $name in $zone of $project"
  [[ $state == READY || $state == ACTIVE ]] || die "$name is $state, not READY: repeat start when it is"
}

check_tree() {
  code_version=$(git -C "$root" describe --always --dirty --abbrev=12 2>/dev/null) ||
    die "$root is no git checkout with a commit: git says which files are shipped"
  local file
  files=()
  while IFS= read -r -d '' file; do
    if [[ -e $root/$file ]]; then files+=("$file"); fi  # git lists deleted ones, too
  done < <(git -C "$root" ls-files -z --cached --others --exclude-standard)
}

check_run() {
  local file=${config%%:*} bucket=${workdir#gs://}
  [[ -f $root/$file && -n $(git -C "$root" ls-files --cached --others --exclude-standard -- "$file" 2>/dev/null) ]] ||
    die "--config: $file is not among the files of $root that are shipped"
  if [[ $workdir == gs://* ]]; then
    [[ $workdir == gs://*/?* ]] || misuse "--workdir=$workdir: a folder in the bucket is needed, gs://BUCKET/DIR"
    query gcloud storage ls "gs://${bucket%%/*}" --project="$project" ||
      die "--workdir: gs://${bucket%%/*} cannot be reached: $complaint"
  else
    note "$workdir must be a folder that all workers share"
  fi
}

check_type() {
  local list=(gcloud compute tpus tpu-vm accelerator-types list "${where[@]}")
  query "${list[@]}" --filter="type=$type" --format='value(type)' ||
    die "the TPU API does not say what zone $zone has: $complaint"
  [[ -n $reply ]] || die "zone $zone has no $type; what it has: ${list[*]}"
}

# The limit only: how much of it is in use shows when gcloud creates.
check_quota() {
  local quota='' limit zones need=$((${type##*-} * slices)) tier=${spot:+Preemptible}
  case $type in
    v5litepod-[148]) ;;  # counted elsewhere where they are for serving
    v5litepod-*) quota=TPUV5s${tier}LitepodPerProjectPerZoneForTPUAPI ;;
    v5p-*) quota=TPUV5P${tier}PerProjectPerZoneForTPUAPI ;;
    v6e-*) quota=TPUV6E${tier}PerProjectPerZoneForTPUAPI ;;
  esac
  if [[ -z $quota || " ${create_flags[*]} " == *" --reserved "* ]]; then
    note "the quota for this $type is not known here; going on"
    return
  fi
  # gcloud may not install its beta commands unasked; a limit of zero comes without a value.
  if query env CLOUDSDK_CORE_DISABLE_PROMPTS=0 gcloud beta quotas info describe "$quota" --project="$project" \
    --service=tpu.googleapis.com --flatten='dimensionsInfos[]' --format="value[separator=' '](
      dimensionsInfos.details.value.yesno(no=0),dimensionsInfos.applicableLocations.list(separator=' '))"; then
    complaint="it does not name the zone"
    while read -r limit zones; do
      if [[ " $zones " != *" $zone "* ]]; then continue; fi
      ((limit < 0 || limit >= need)) ||  # -1: no limit
        die "quota $quota in $zone is $limit, $need needed; more is asked for at$(printf ' %s' \
          "https://console.cloud.google.com/iam-admin/quotas?project=$project&service=tpu.googleapis.com")"
      return 0
    done <<<"$reply"
  fi
  note "quota $quota cannot be read ($complaint); going on"
}

create_tpu() {
  local flags=("${where[@]}" --accelerator-type="$type" "${create_flags[@]}")
  [[ -n $type ]] || misuse "there is no $name in $zone yet: give --type to make it"
  if [[ -z $version ]]; then
    case $type in
      v[234]-*) version=tpu-ubuntu2204-base ;;
      v5litepod-*) version=v2-alpha-tpuv5-lite ;;
      v5p-*) version=v2-alpha-tpuv5 ;;
      v6e-*) version=v2-alpha-tpuv6e ;;
      *) misuse "--type=$type has no default --version: give it" ;;
    esac
  fi
  check_type
  check_quota
  if [[ -n $spot ]]; then flags+=(--spot); fi
  if [[ -z $queued ]]; then
    kind='tpu-vm'
    flags+=(--version="$version")
  else
    kind='queued-resources'
    flags+=(--runtime-version="$version")
    if ((slices > 1)); then flags+=(--node-count="$slices"); else flags+=(--node-id="$name"); fi
  fi
  run gcloud compute tpus "$kind" create "$name" "${flags[@]}" || die "$name could not be made (gcloud's message above)"
}

delete_tpu() {  # FLAG...
  if [[ $kind == queued-resources ]]; then set -- "$@" --force; fi  # its nodes, too
  run gcloud compute tpus "$kind" delete "$name" "${where[@]}" "$@" || die "$name was not deleted"
}

wait_for_queue() {
  local before=''
  while [[ $state != ACTIVE ]]; do
    case $state in FAILED | SUSPEND* | DELETING | '') die "$name is ${state:-gone}: start again requests it again" ;; esac
    [[ $state == "$before" ]] || note "$name is $state; waiting (Ctrl-C leaves it in the queue, start waits on)"
    before=$state
    sleep "$poll"
    find_tpu
  done
}

ship() {
  note "shipping ${#files[@]} files of $code_version"
  printf '%s\0' "${files[@]}" >"$tmp/files"
  run mkdir "$tmp/imm_jax_run"
  run cp "$root/launch_tpu_worker.sh" "$tmp/imm_jax_run"
  run tar -czf "$tmp/imm_jax_run/code.tar.gz" -C "$root" --null -T "$tmp/files"
  on_workers scp --recurse "$tmp/imm_jax_run" "$name:" ||
    die "the code did not reach all workers of $name; several workers need ssh-add ~/.ssh/google_compute_engine"
}

start() {
  check_tree
  check_run
  case $state in PREEMPTED | TERMINATED | SUSPENDED | FAILED)
    note "$name is $state, and only its name is left: it is created again"
    delete_tpu --quiet
    state='' ;;
  esac
  if [[ -z $state ]]; then
    create_tpu
    if ((dry_run)); then state=READY; else find_tpu; fi
  fi
  if [[ $kind == queued-resources ]] && ((!dry_run)); then wait_for_queue; fi
  need_ready
  ship
  call_workers stop "$grace"
  call_workers install "$code_version"
  call_workers run --config="$config" --workdir="$workdir" --distributed=on "${overrides[@]}"
  ((dry_run)) || note "started; its log: launch_tpu.sh tail --name=$name ${where[*]}"
}

restart() {
  if [[ -n $install ]]; then check_tree; ship; fi
  call_workers stop "$grace"
  if [[ -n $install ]]; then call_workers install "$code_version"; fi
  call_workers run
}

tail_log() {
  local one=(--worker="$worker")
  if [[ $kind == queued-resources ]]; then one+=(--node="$slice"); fi
  run gcloud compute tpus "$kind" ssh "$name" "${where[@]}" "${one[@]}" "${ssh_flags[@]}" \
    --command='bash imm_jax_run/launch_tpu_worker.sh tail'
}

parse() {
  local key value
  while (($#)); do
    key=${1%%=*} value=${1#*=}
    case $key in
      --) overrides=("${@:2}"); return ;;
      -h | --help) usage; exit ;;
      --dry_run | --queued | --spot | --install)
        [[ $1 == "$key" ]] || misuse "$key takes no value"
        value=1 ;;
      --name | --zone | --project | --type | --version | --config | --workdir | --slices | --grace | --worker \
        | --slice | --poll | --create_flag | --ssh_flag)
        if [[ $1 == "$key" ]]; then
          (($# > 1)) || misuse "$key needs a value"
          value=$2
          shift
        fi ;;
      *) misuse "no option '$1'; what imm_jax.main is to get follows --" ;;
    esac
    case $key in
      --create_flag) create_flags+=("$value") ;;
      --ssh_flag) ssh_flags+=("$value") ;;
      *) printf -v "${key#--}" %s "$value" ;;
    esac
    shift
  done
}

check_arguments() {
  local key
  [[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || misuse "--name='$name': lower case letters, digits and - are right"
  for key in slices grace worker slice poll; do
    [[ ${!key} =~ ^(0|[1-9][0-9]*)$ ]] || misuse "--$key='${!key}' is no whole number"
  done
  ((slices > 0)) || misuse "--slices=0: 1 or more is right"
  if ((slices > 1)); then queued=1; fi  # as gcloud makes several slices
  type=${type/#v5e-/v5litepod-}
  [[ -z $type || $type =~ ^v[0-9]+[a-z]*-[1-9][0-9]*$ ]] || misuse "--type='$type': v5litepod-16, say, is right"
  if [[ $command == start ]]; then
    [[ -n $config && -n $workdir ]] || misuse "start needs --config and --workdir"
  else
    [[ -z "$config$workdir$type${overrides[*]}" ]] || misuse "--config, --workdir, --type and overrides are for start"
  fi
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "bash 4.4 or newer is needed"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
command=${1:-} name='' zone='' project='' type='' version='' config='' workdir='' queued='' spot='' install=''
dry_run=0 slices=1 grace=300 worker=0 slice=0 poll=30
create_flags=() ssh_flags=() overrides=()
case $command in
  start | restart | stop | tail | status | delete) ;;
  -h | --help | help) usage; exit ;;
  *) misuse "'$command' is no command" ;;
esac
parse "${@:2}"
check_arguments
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
check_account
find_tpu
case $command in
  start) start ;;
  restart) need_ready; restart ;;
  stop) need_ready; call_workers stop "$grace" ;;
  tail) need_ready; tail_log ;;
  status)
    note "$name is ${state:-not there}"
    if [[ $state == READY || $state == ACTIVE ]]; then call_workers status; fi ;;
  delete) [[ -n $state ]] || need_ready; delete_tpu ;;
esac
