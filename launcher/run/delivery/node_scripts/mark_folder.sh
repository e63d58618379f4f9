# Arguments: a folder, a file name. Creates both, then prints the free disk space.
set -e
umask 022
mkdir -p -- "$1"
: >"$1/$2"
df -Pk -- "$1"
