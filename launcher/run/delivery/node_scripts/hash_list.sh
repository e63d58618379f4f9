# Prints the sha256 of the sorted output of list_files.sh, whose arguments it takes.
path=$1
shift
{ find -L "$path" "$@" 2>/dev/null || true; } | LC_ALL=C sort -z | sha256sum
