# Defines `ask NAME LIMIT_S COMMAND...`, which runs a command and marks its output. `mark` and `tool_folders` are assigned above it.
# shellcheck shell=sh disable=SC2154
export LC_ALL=C PATH="$PATH:$tool_folders"
ask() {
  printf '\n%s %s\n' "$mark" "$1"
  printf '\n%s %s\n' "$mark" "$1" >&2
  limit=$2
  shift 2
  timeout -k 1 "$limit" "$@" </dev/null # a dead NFS mount or a driver that hangs must not take the other answers with it
  printf '\n%scode %s\n' "$mark" "$?"
}
