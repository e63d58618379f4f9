# Creates the folder of a run on a node, in one command. For any POSIX shell.
# Arguments: the spec's file name and size in bytes, the container's user (uid:gid), the name of an empty
# file that marks a data check under way ("" for none), the parent folder, the run's folder, other folders that the
# container writes to. The spec comes over stdin. Prints the login user as uid:gid; if that is root, the container's user owns the folders afterwards.
# Exit codes: 10 the parent could not be created, 11 the run's folder could not be created (it may exist).
umask 022
name=$1 bytes=$2 user=$3 pending=$4 above=$5 run=$6
shift 6
mkdir -p -- "$above" "$@" || exit 10
mkdir -- "$run" || exit 11
cat >"$run/.$name" && [ "$(wc -c <"$run/.$name")" -eq "$bytes" ] && mv -- "$run/.$name" "$run/$name" || exit
if [ -n "$pending" ]; then : >"$run/$pending" || exit; fi
login=$(id -u):$(id -g)
if [ "$login" = 0:0 ] && [ "$user" != 0:0 ]; then chown -R -- "$user" "$run" "$@" || exit; fi
echo "$login"
