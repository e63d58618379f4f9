# Arguments: a path, then an expression of find. What may not be read, such as lost+found, counts as absent.
path=$1
shift
find -L "$path" "$@" 2>/dev/null || true
