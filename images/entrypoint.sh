#!/bin/bash
# The only shell of the project. CANN keeps a part of its environment in scripts; all else is in ENV. Ends by becoming its
# arguments, so that signals reach the trainer itself.
toolkit=/usr/local/Ascend/ascend-toolkit/set_env.sh
transformer_boost=/usr/local/Ascend/nnal/atb/set_env.sh
if [ -f "$toolkit" ]; then source "$toolkit"; fi
# Said outright, since the script would otherwise read this one's arguments and ask torch; torch has the C++11 ABI since 2.7.
if [ -f "$transformer_boost" ]; then source "$transformer_boost" --cxx_abi=1; fi
exec "$@"
