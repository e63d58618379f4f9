# Of the folder $1, or the nearest one above it that exists: its path, whether it is writable, free KiB and free inodes.
# shellcheck shell=sh
path=$1
while [ ! -e "$path" ]; do
  path=${path%/*}
  path=${path:-/}
done
echo "$path"
if [ -w "$path" ]; then echo yes; else echo no; fi
df -Pk "$path"
df -Pi "$path"
