#!/bin/bash
# Prepares the environment of a container, then replaces itself with its arguments, so that signals reach the trainer. CANN defines a part
# of its environment in scripts; everything else is in ENV.

# The secrets whose names are in OMNILAUNCH_SECRETS come through a named pipe, each ended by a NUL: `docker inspect` shows every variable
# of a container, and a file would stay on the node's disk. The pipe is opened for reading and writing, since opening only one end
# blocks. The launcher creates it too; whichever comes first does.
if [ -n "$OMNILAUNCH_SECRETS" ]; then
  pipe=/dev/shm/omnilaunch-secrets
  mkfifo -m 600 "$pipe" 2>/dev/null
  exec 3<>"$pipe"
  for name in $OMNILAUNCH_SECRETS; do
    if ! IFS= read -r -d '' -t 60 -u 3 value; then
      echo "entrypoint.sh: no value for $name came within 60 s; the launcher sends it when it starts the container" >&2
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
# The option is given because the script would otherwise read the arguments of this one and import torch; torch has the C++11 ABI since 2.7.
if [ -f "$transformer_boost" ]; then source "$transformer_boost" --cxx_abi=1; fi
# CANN writes its log to this folder; if the folder cannot be created, CANN would write none.
if [ -n "$ASCEND_PROCESS_LOG_PATH" ] && ! mkdir -p "$ASCEND_PROCESS_LOG_PATH"; then
  echo "entrypoint.sh: CANN's log goes to $HOME/ascend/log, since uid $(id -u) cannot create $ASCEND_PROCESS_LOG_PATH" >&2
  unset ASCEND_PROCESS_LOG_PATH
fi
# CANN's compiler writes kernel_meta and fusion_result.json to the working folder, which the run's user must be able to write; the image's own is
# not. The trainer is found by its path then.
if [ -n "$ASCEND_PROCESS_LOG_PATH" ] && mkdir -p "$ASCEND_PROCESS_LOG_PATH/work"; then
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  cd "$ASCEND_PROCESS_LOG_PATH/work" || exit 4
elif [ -f "$toolkit" ]; then
  export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
  cd /tmp || exit 4
fi
exec "$@"
