# Writes stdin to the file $1 with the mode $2; $3: its size in bytes. Written to a temporary name and renamed when all bytes have arrived:
# a lost connection looks like the end of the input.
set -e
umask 022
case "$1" in */*) mkdir -p -- "${1%/*}/" ;; esac
[ ! -d "$1" ] || { echo "it is a folder" >&2; exit 1; }
umask 077
part="$1.part.$$"
trap 'rm -f -- "$part"' EXIT
cat >"$part"
[ "$(wc -c <"$part")" -eq "$3" ]
chmod -- "$2" "$part"
mv -f -- "$part" "$1"
