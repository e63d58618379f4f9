# The body of every node's script of `omnilaunch render`. node_script.py assigns the other variables above it.
# shellcheck shell=bash disable=SC2154

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
login=$(id -u):$(id -g)
umask 022

usage() {
  cat <<'END'
(nothing)      check, data, start
check          check whether this node is ready; nothing is changed
data           check the data in a container
start          start the ranks in a container that continues in the background
follow         show the log until the container ends; Ctrl-C only stops showing it
status         the state of the container
stop           let the ranks save and end
save [FOLDER]  copy log and reports to FOLDER (default: saved/TIME next to this script)
remove         save, then end the container if it runs, and remove it
--anyway       with the first four: continue in spite of the problems that were found
END
}

die() {
  printf '%s: %s\n' "${0##*/}" "$1" >&2
  exit 4
}

# ---------------------------------------------------------------------------------------------------------------- check

problems=()
problem() { problems+=("$1"); }

check_node() {
  if [ "$(uname -m)" != "$architecture" ]; then problem "this machine is $(uname -m), the image is for $architecture"; fi
  check_network
  check_engine
  check_files
  check_folder
  local secret
  for secret in ${secrets[@]+"${secrets[@]}"}; do
    if [ -z "${!secret+there}" ]; then problem "the secret $secret is not set: export $secret=..."; fi
  done
  if [ "${#problems[@]}" -eq 0 ]; then return 0; fi
  printf 'node %s (%s) is not ready:\n' "$node" "$host" >&2
  printf '  %s\n' "${problems[@]}" >&2
  if [ -z "$anyway" ]; then exit 4; fi
}

check_network() {
  if [ -n "$interface" ] && [ ! -e "/sys/class/net/$interface" ]; then problem "the network interface $interface does not exist"; fi
  if [[ $address =~ ^[0-9.]+$ && -r /proc/net/fib_trie ]]; then
    if [[ $(grep -A1 -e "|-- $address\$" /proc/net/fib_trie) != *"host LOCAL"* ]]; then
      problem "this machine does not have the address $address: is it the right one?"
    fi
  fi
  local range port
  for range in ${ports[@]+"${ports[@]}"}; do
    for ((port = ${range%-*}; port <= ${range#*-}; port++)); do
      if grep -qsE "^ *[0-9]+: [0-9A-F]+:$(printf %04X "$port") [0-9A-F]+:[0-9A-F]{4} 0A " /proc/net/tcp /proc/net/tcp6; then
        problem "port $port is in use (sudo ss -ltnp 'sport = :$port' shows the program)"
      fi
    done
  done
}

check_engine() {
  local said other
  if ! command -v docker >/dev/null; then
    problem "there is no docker command on PATH"
    return
  fi
  if ! said=$(docker version --format '{{.Server.Version}}' 2>&1); then
    problem "the Docker engine does not respond (start it, join the group docker, or use sudo): ${said##*$'\n'}"
    return
  fi
  if ! said=$(docker image inspect --format "{{.Id}} {{index .Config.Labels \"$label\"}}" "$image" 2>/dev/null); then
    problem "there is no image $image: README.txt says how to bring it"
  elif [ "${said#* }" != "$fingerprint" ]; then
    problem "image $image is not the image of this run: its fingerprint is ${said#* }"
  elif [ -f "$here/image.id" ] && [ "${said%% *}" != "$(cat -- "$here/image.id")" ]; then
    problem "image $image has id ${said%% *}, image.id names another: bring the image that was built, so that all nodes run the same"
  fi
  for other in "$name" "$name-data"; do
    if docker container inspect "$other" >/dev/null 2>&1; then problem "container $other exists already (${0##*/} status, ${0##*/} remove)"; fi
  done
  if [ -n "$runtime" ] && [[ $(docker info --format '{{json .Runtimes}}' 2>&1) != *"\"$runtime\""* ]]; then
    problem "the Docker engine has no runtime $runtime"
  fi
}

check_files() {
  local path number
  for path in ${sources[@]+"${sources[@]}"} ${devices[@]+"${devices[@]}"}; do
    if [ ! -e "$path" ]; then problem "$path does not exist, or you may not see it"; fi
  done
  for number in ${gpus[@]+"${gpus[@]}"}; do
    if ! nvidia-smi --id="$number" --list-gpus >/dev/null 2>&1; then problem "nvidia-smi does not show GPU $number"; fi
  done
}

check_folder() {
  if [ ! -e "$folder" ]; then return 0; fi
  if ! belongs_to_run; then problem "$folder exists and belongs to another run, or you may not read it"; fi
  if grep -qs '"status": "finished"' "$result"; then problem "this run is finished: $result"; fi
}

# Whether the folder belongs to this run: made by `data`, by a node that shares it, or by an earlier attempt, which is continued.
belongs_to_run() { cmp -s -- "$here/spec.json" "$spec" || { [ -d "$folder" ] && [ -z "$(ls -A -- "$folder")" ]; }; }

# ---------------------------------------------------------------------------------------------------------------- start

make_folder() {
  mkdir -p -- "$parent" ${data_root:+"$data_root"}
  if [ -e "$folder" ] && ! belongs_to_run; then die "$folder exists and belongs to another run; nothing was changed"; fi
  if ! cmp -s -- "$here/spec.json" "$spec"; then
    mkdir -p -- "$folder"
    cp -- "$here/spec.json" "$spec.$$"
    chmod 644 -- "$spec.$$"
    mv -f -- "$spec.$$" "$spec"
  fi
  change_owner "$folder"
  if [ -n "$data_root" ]; then change_owner "$data_root"; fi
}

# Change the owner to the container's user: as root, or in a container where the login is not root.
change_owner() {
  if [ "$(stat -c %u:%g -- "$1")" = "$user" ]; then return 0; fi
  if [ "$login" = 0:0 ]; then
    chown -R -- "$user" "$1"
  else
    docker run --rm --network none --user 0:0 --entrypoint chown --mount "type=bind,source=$1,target=$1" "$image" -R -- "$user" "$1"
  fi
}

write_env() {
  rm -f -- "$1"
  (umask 077 && cat -- "$here/$env" >"$1")
}

check_data() {
  trap 'rm -f -- "$data_env_path"' EXIT
  write_env "$data_env_path"
  printf 'checking the data\n'
  local code=0
  "${prepare[@]}" || code=$?
  rm -f -- "$data_env_path"
  if [ "$code" -ne 0 ]; then
    printf '%s: the data check ended with exit code %s; nothing was started\n' "${0##*/}" "$code" >&2
    exit "$code"
  fi
}

start_ranks() {
  trap 'rm -f -- "$env_path"' EXIT
  write_env "$env_path"
  if [ "${#secrets[@]}" -gt 0 ]; then printf '%s=%s\n' "$secrets_variable" "${secrets[*]}" >>"$env_path"; fi
  if ! "${start[@]}" >/dev/null; then die "the container did not start"; fi
  rm -f -- "$env_path"
  if ! pass_secrets; then
    docker rm --force "$name" >/dev/null
    die "the secrets could not be passed to the container; it was removed"
  fi
  printf 'node %s is started, in container %s; %s follow shows its log\n' "$node" "$name" "${0##*/}"
}

# Through a pipe in the container's memory, where its entrypoint reads them in this order: never in a file, an argv or `docker inspect`.
pass_secrets() {
  if [ "${#secrets[@]}" -eq 0 ]; then return 0; fi
  docker exec --interactive "$name" mkfifo -m 600 "$secrets_pipe" </dev/null >/dev/null 2>&1 || true # it exists where the container was faster
  local secret
  for secret in "${secrets[@]}"; do printf '%s\0' "${!secret}"; done |
    docker exec --interactive "$name" dd of="$secrets_pipe" conv=nocreat,notrunc status=none
}

# ---------------------------------------------------------------------------------------------------------------- after

state() {
  local said
  if said=$("${probe[@]}" 2>/dev/null); then printf '%s' "$said"; else printf 'gone 137'; fi
}

print_end() {
  local said
  said=$(state)
  printf 'node %s: %s, exit code %s\n' "$node" "${said% *}" "${said##* }"
  case $said in exited* | dead* | gone*) return "${said##* }" ;; esac
}

stop_ranks() {
  "${stop[@]}" >/dev/null || true
  printf 'the ranks save and end; waiting for them (Ctrl-C only stops waiting; to end them now: %s remove)\n' "${0##*/}"
  docker wait "$name" >/dev/null || true
  print_end || true
}

save() {
  local to=${1:-$here/saved/$(date +%Y%m%d-%H%M%S)} path
  mkdir -p -- "$to/node$node"
  docker logs "$name" >"$to/node$node.log" 2>&1
  for path in "$folder"/*.json "$folder"/*.jsonl; do
    if [ -f "$path" ]; then cp -- "$path" "$to/node$node/"; fi
  done
  printf 'saved to %s\n' "$to"
}

anyway='' words=()
for word in "$@"; do
  if [ "$word" = --anyway ]; then anyway=yes; else words+=("$word"); fi
done
case ${words[0]:-all} in
  all)
    check_node
    make_folder
    check_data
    start_ranks
    ;;
  check)
    check_node
    printf 'node %s (%s) is ready\n' "$node" "$host"
    ;;
  data)
    check_node
    make_folder
    check_data
    ;;
  start)
    check_node
    make_folder
    start_ranks
    ;;
  follow)
    "${logs[@]}"
    print_end
    ;;
  status) print_end || true ;;
  stop) stop_ranks ;;
  save) save "${words[1]:-}" ;;
  remove)
    if docker container inspect "$name" >/dev/null 2>&1; then save; fi
    "${remove[@]}"
    ;;
  help | -h | --help) usage ;;
  *)
    usage >&2
    exit 2
    ;;
esac
