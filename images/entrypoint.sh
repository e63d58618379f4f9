#!/bin/bash
# The only shell of an image. CANN keeps a part of its environment in scripts; all else is in ENV. Ends by becoming its
# arguments, so that signals reach the trainer itself.

# Secrets are named in OMNILAUNCH_SECRETS and come through a pipe, each ended by a NUL: `docker inspect` shows every variable that the
# container is given, and a file would lie on the node's disk. Opened both ways, since a pipe with one end would hold up this script
# for ever; the launcher makes it too, whoever is first.
if [ -n "$OMNILAUNCH_SECRETS" ]; then
  pipe=/dev/shm/omnilaunch-secrets
  mkfifo -m 600 "$pipe" 2>/dev/null
  exec 3<>"$pipe"
  for name in $OMNILAUNCH_SECRETS; do
    if ! IFS= read -r -d '' -t 60 -u 3 value; then
      echo "entrypoint.sh: no value for $name came within 60 s; the launcher gives it when it starts the container" >&2
      exit 4
    fi
    export "$name=$value"
  done
  exec 3>&-
  rm -f "$pipe"
fi
toolkit=/usr/local/Ascend/ascend-toolkit/set_env.sh
transformer_boost=/usr/local/Ascend/nnal/atb/set_env.sh
if [ -f "$toolkit" ]; then source "$toolkit"; fi
# Said outright, since the script would otherwise read this one's arguments and ask torch; torch has the C++11 ABI since 2.7.
if [ -f "$transformer_boost" ]; then source "$transformer_boost" --cxx_abi=1; fi
# CANN keeps its log there when it may; a folder that cannot be made would leave none at all.
if [ -n "$ASCEND_PROCESS_LOG_PATH" ] && ! mkdir -p "$ASCEND_PROCESS_LOG_PATH"; then
  echo "entrypoint.sh: CANN's log goes to $HOME/ascend/log, since uid $(id -u) cannot make $ASCEND_PROCESS_LOG_PATH" >&2
  unset ASCEND_PROCESS_LOG_PATH
fi
exec "$@"
